/* Which networks are FreeFlow's: the plugin's list, and a question to the plugin. */
#ifndef FREEFLOW_QUESTION_H
#define FREEFLOW_QUESTION_H

#include <json-c/json.h>

/* Whether one of these networks, as networks_of() returns them, is accelerated by FreeFlow. */
int is_accelerated(struct json_object *networks);

#endif
