/* Changes of a container's configuration (OCI runtime specification, config.md). */
#ifndef FREEFLOW_EDIT_H
#define FREEFLOW_EDIT_H

#include <json-c/json.h>

/* Whether the container may get the library: nothing in its configuration is against it. */
int accepts_library(struct json_object *config);

/* Adds mount and variable. Returns 0; or -1, and then the value must be thrown away. */
int add_library(struct json_object *config, int bundle);

/* Whether a program with this `process` preloads the library. */
int preloads_library(struct json_object *process);

/* Whether the folder of the library is mounted. */
int mounts_library(struct json_object *config);

/* Adds the variable to a further program. Returns 1 if it was added, else 0. */
int add_variable(struct json_object *process);

#endif
