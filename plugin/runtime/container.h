/* A container, as Docker has described it on disk. */
#ifndef FREEFLOW_CONTAINER_H
#define FREEFLOW_CONTAINER_H

#include <json-c/json.h>

/*
 * The networks of the container with this configuration and ID: an array of {"name": …, "id": …},
 * where the ID may be empty. NULL: it isn't Docker's, it has no network of its own, or its label
 * says `off`.
 */
struct json_object *networks_of(struct json_object *config, const char *id);

#endif
