/* What is done before the real runtime is called. */
#ifndef FREEFLOW_BUNDLE_H
#define FREEFLOW_BUNDLE_H

#include "arguments.h"

/* Gives the library to a container that is about to be created, if it is to have it. */
void prepare_container(const struct arguments *arguments);

/* Gives it to a further program in a container that has it (`docker exec`, health checks). */
void prepare_program(const struct arguments *arguments);

/* Whether the container of these arguments has the library. */
int is_prepared(const struct arguments *arguments);

#endif
