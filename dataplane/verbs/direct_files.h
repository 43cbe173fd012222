/* Files of direct memory, as the router gives them: for this process's extents (extents.h), and
 * those of its peers (direct.h).
 */
#ifndef FREEFLOW_DIRECT_FILES_H
#define FREEFLOW_DIRECT_FILES_H

/* The device is there: ask for files from now on. */
void direct_files_start(void);

#endif
