/* JSON, by json-c. */
#ifndef FREEFLOW_DOCUMENT_H
#define FREEFLOW_DOCUMENT_H

#include <json-c/json.h>
#include <stddef.h>

/* The value, or NULL if the text is not exactly one value. */
struct json_object *parse_json(const char *bytes, size_t length);

/*
 * As parse_json, but NULL also if writing the value again would change anything besides the
 * notation of strings: names that occur twice, numbers past 64 bits, NUL characters.
 */
struct json_object *parse_exactly(const char *bytes, size_t length);

/* The value as compact text, which lives as long as the value does. */
const char *json_text(struct json_object *value, size_t *length);

/* The member of this name and type, or NULL, whatever `object` is. */
struct json_object *member(struct json_object *object, const char *name, enum json_type type);

/* The string's characters, or NULL if it isn't a string. */
const char *string_of(struct json_object *value);

#endif
