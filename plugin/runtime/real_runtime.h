/* The runtime that does the work: runc, or what else the engine used before. */
#ifndef FREEFLOW_REAL_RUNTIME_H
#define FREEFLOW_REAL_RUNTIME_H

#include <limits.h>

struct settings {
        char runtime[PATH_MAX]; /* an absolute path; empty: runc in PATH */
        int off;                /* containers start as they are */
};

/* What `freeflow runtime install` has written; the defaults if that can't be read. */
struct settings read_settings(void);

/*
 * Replaces this program by the real runtime, with the same arguments. Returns only if there is
 * none.
 */
void become_real(struct settings *settings, char **words);

#endif
