/*
 * JSON, by json-c, and the check that it keeps a document as it is.
 *
 * json-c keeps the order of members, unsigned numbers of 64 bits, and the text of fractions. Of
 * members with the same name it keeps the last, and it cuts larger integers off. So the text is
 * compared with what json-c writes, without blanks and without what is in strings.
 */
#include "document.h"

#include <string.h>

#include "host.h"

static int blank(char byte)
{
        return byte == ' ' || byte == '\t' || byte == '\n' || byte == '\r';
}

struct json_object *parse_json(const char *bytes, size_t length)
{
        struct json_tokener *tokener = json_tokener_new_ex(MOST_DEPTH);
        struct json_object *value;

        if (tokener == NULL)
                return NULL;
        while (length > 0 && blank(bytes[length - 1]))
                length--;
        json_tokener_set_flags(tokener, JSON_TOKENER_STRICT | JSON_TOKENER_VALIDATE_UTF8);
        value = json_tokener_parse_ex(tokener, bytes, (int)length);
        if (value != NULL && (json_tokener_get_error(tokener) != json_tokener_success ||
                              json_tokener_get_parse_end(tokener) != length)) {
                json_object_put(value);
                value = NULL;
        }
        json_tokener_free(tokener);
        return value;
}

/*
 * The next byte of a text that is neither a blank nor inside a string, or 0 at the end. A string
 * is seen as its first quotation mark; one with a control character, which JSON does not allow,
 * as that.
 */
static char next_outside(const char **at, const char *end)
{
        char seen = '"';

        while (*at < end && blank(**at))
                ++*at;
        if (*at >= end)
                return '\0';
        if (**at != '"')
                return *(*at)++;
        for (++*at; *at < end && **at != '"'; ++*at) {
                if ((unsigned char)**at < ' ')
                        seen = **at;
                if (**at == '\\' && *at + 1 < end)
                        ++*at;
        }
        if (*at < end)
                ++*at;
        return seen;
}

static int same_outside_strings(const char *one, size_t one_length, const char *two, size_t two_length)
{
        const char *one_end = one + one_length, *two_end = two + two_length;
        char byte;

        do {
                byte = next_outside(&one, one_end);
                /* NaN and Infinity, which json-c takes for numbers. */
                if (byte == 'N' || byte == 'I' || byte != next_outside(&two, two_end))
                        return 0;
        } while (byte != '\0');
        return 1;
}

struct json_object *parse_exactly(const char *bytes, size_t length)
{
        struct json_object *value;
        const char *text;
        size_t written;

        if (memchr(bytes, '\0', length) != NULL || memmem(bytes, length, "\\u0000", 6) != NULL)
                return NULL;
        value = parse_json(bytes, length);
        if (value == NULL)
                return NULL;
        text = json_text(value, &written);
        if (text == NULL || !same_outside_strings(bytes, length, text, written)) {
                json_object_put(value);
                return NULL;
        }
        return value;
}

const char *json_text(struct json_object *value, size_t *length)
{
        return json_object_to_json_string_length(
            value, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE, length);
}

struct json_object *member(struct json_object *object, const char *name, enum json_type type)
{
        struct json_object *found = NULL;

        if (!json_object_is_type(object, json_type_object) ||
            !json_object_object_get_ex(object, name, &found))
                return NULL;
        return json_object_is_type(found, type) ? found : NULL;
}

const char *string_of(struct json_object *value)
{
        return json_object_is_type(value, json_type_string) ? json_object_get_string(value) : NULL;
}
