/*
 * Where freeflow-runc finds the host's files, and its limits.
 *
 * Everything is bounded: the sizes of what is read, the depth of JSON, and the time. Past a limit
 * the container starts unchanged.
 */
#ifndef FREEFLOW_HOST_H
#define FREEFLOW_HOST_H

#define FOLDER "/run/freeflow"
#define LIBRARY FOLDER "/libfreeflow.so"
#define SETTINGS "/etc/freeflow/runtime"
#define NETWORKS "/run/freeflow-admin/networks.json"
#define ADMIN_SOCKET "/run/freeflow-admin/admin.sock"

enum {
        MOST_BYTES = 2 << 20,        /* of a file */
        MOST_DEPTH = 64,             /* of JSON; configurations of containers have about ten levels */
        MOST_NETWORKS = 64,          /* of one container */
        MOST_ARGUMENTS = 64 << 10,   /* bytes of a program's: half of what Linux always allows */
        MOST_ANSWER = 4096,          /* bytes of the plugin's answer */
        QUESTION_MILLISECONDS = 100, /* for the question to the plugin */
        WORK_MILLISECONDS = 300,     /* for everything; then the container starts as it is */
};

/*
 * A path of the host. Tests put FREEFLOW_TEST_ROOT before it; the result is valid until the next
 * call.
 */
const char *host_path(const char *path);

/* A limit of time. Tests multiply it by FREEFLOW_TEST_PATIENCE, because their machine is busy. */
long patience(long milliseconds);

#endif
