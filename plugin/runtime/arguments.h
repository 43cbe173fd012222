/*
 * What the arguments of an OCI runtime ask for. They are those of runc; crun and youki have the
 * same.
 */
#ifndef FREEFLOW_ARGUMENTS_H
#define FREEFLOW_ARGUMENTS_H

enum command { COMMAND_OTHER, COMMAND_CREATE, COMMAND_EXEC, COMMAND_CHECKPOINT };

struct arguments {
        enum command command; /* `run` is COMMAND_CREATE */
        const char *bundle;   /* "." without --bundle */
        const char *process;  /* of exec: the file of --process, or NULL */
        const char *log;      /* the file of --log, or NULL */
        int log_json;         /* --log-format json */
        const char *id;       /* the container's ID: the last argument */
};

struct arguments parse_arguments(int count, char *const *words);

#endif
