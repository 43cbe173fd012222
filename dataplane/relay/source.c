#include "source.h"

#include "context.h"

#include <stdlib.h>

static struct source *find(struct link *link, uint64_t owner)
{
        EACH(node, &link->sources) {
                struct source *source = OF(node, struct source, of_link);

                if (source->owner == owner)
                        return source;
        }
        return NULL;
}

struct source *source_enter(struct link *link, uint64_t owner)
{
        struct source *source = find(link, owner);

        if (!source) {
                source = relay_memory(sizeof *source, "memory for a process's connections");
                source->link = link;
                source->owner = owner;
                list_init(&source->of_link);
                list_init(&source->scanned);
                list_init(&source->active);
                for (int i = 0; i < LANES; i++) {
                        list_init(&source->parts[i].turn);
                        list_init(&source->parts[i].queue);
                }
                list_add(&link->sources, &source->of_link);
        }
        source->mirrors++;
        return source;
}

void source_leave(struct source *source)
{
        if (--source->mirrors)
                return;
        for (int i = 0; i < LANES; i++)
                list_remove(&source->parts[i].turn);
        list_remove(&source->of_link);
        list_remove(&source->scanned);
        free(source);
}
