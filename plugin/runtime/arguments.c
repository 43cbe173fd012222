/*
 * Finds the command and the options that matter among a runtime's arguments.
 *
 * Global options come before the command. What is not understood leads to COMMAND_OTHER, which
 * the real runtime gets without further ado.
 */
#include "arguments.h"

#include <string.h>

/*
 * If word `at` is the option, its value, and `at` moves to the last word of it; else NULL. As in
 * Go, one dash and two mean the same, and a value follows "=" or is the next word.
 */
static const char *option(int count, char *const *words, int *at, const char *name)
{
        const char *word = words[*at];
        size_t length = strlen(name);

        if (word[0] != '-')
                return NULL;
        word += word[1] == '-' ? 2 : 1;
        if (strncmp(word, name, length) != 0)
                return NULL;
        if (word[length] == '=')
                return word + length + 1;
        if (word[length] != '\0' || *at + 1 >= count)
                return NULL;
        return words[++*at];
}

static enum command command_of(const char *word)
{
        if (strcmp(word, "create") == 0 || strcmp(word, "run") == 0)
                return COMMAND_CREATE;
        if (strcmp(word, "exec") == 0)
                return COMMAND_EXEC;
        return strcmp(word, "checkpoint") == 0 ? COMMAND_CHECKPOINT : COMMAND_OTHER;
}

/* Reads the global options, and returns the index of the command, or `count`. */
static int read_globals(int count, char *const *words, struct arguments *found)
{
        int at = 1;

        for (; at < count && words[at][0] == '-'; at++) {
                const char *value;

                if ((value = option(count, words, &at, "log")) != NULL)
                        found->log = value;
                else if ((value = option(count, words, &at, "log-format")) != NULL)
                        found->log_json = strcmp(value, "json") == 0;
                else if (option(count, words, &at, "root") == NULL &&
                         option(count, words, &at, "criu") == NULL)
                        option(count, words, &at, "rootless");
        }
        return at;
}

struct arguments parse_arguments(int count, char *const *words)
{
        struct arguments found = {.bundle = "."};
        int at = read_globals(count, words, &found);

        if (at + 1 >= count)
                return found;
        found.command = command_of(words[at]);
        found.id = words[count - 1];
        for (at++; at < count - 1; at++) {
                const char *value;

                if ((value = option(count, words, &at, "bundle")) != NULL ||
                    (value = option(count, words, &at, "b")) != NULL)
                        found.bundle = value;
                else if (found.command == COMMAND_EXEC &&
                         ((value = option(count, words, &at, "process")) != NULL ||
                          (value = option(count, words, &at, "p")) != NULL))
                        found.process = value;
        }
        return found;
}
