#include "cm_table.h"

#include "counter.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
        DESCRIPTORS = 65536, /* above there are no channels */
        SERIALS = 0x7fff,
};

struct mutex cm_mutex;

static struct {
        struct cm_file *files;
        struct cm_file *of_descriptor[DESCRIPTORS];
        struct cm_id *ids[CM_IDS];
        struct cm_group *groups[CM_GROUPS];
        uint32_t free_id, free_group; /* all below are in use */
        uint32_t end_id;              /* all from here on are not */
        uint32_t serial;
        uint32_t generation; /* of this process, to tell its channels from those of its parents */
} table;

/* --- event channels */

static bool is_descriptor(int fd)
{
        return fd >= 0 && fd < DESCRIPTORS;
}

int cm_file_open(void)
{
        struct cm_file *file = calloc(1, sizeof *file);
        int fd;

        if (!file)
                return -ENOMEM;
        fd = counter_make();
        if (is_descriptor(fd)) {
                *file = (struct cm_file){
                    .next = table.files, .generation = table.generation, .fd = fd, .descriptors = 1};
                file->last = &file->first;
                table.files = file;
                table.of_descriptor[fd] = file;
                return fd;
        }
        free(file);
        if (fd < 0)
                return fd;
        sys_1(SYS_close, fd);
        return -EMFILE;
}

bool cm_file_is(int fd)
{
        return is_descriptor(fd) && table.of_descriptor[fd];
}

struct cm_file *cm_file_of(int fd)
{
        struct cm_file *file = is_descriptor(fd) ? table.of_descriptor[fd] : NULL;

        return file && file->generation == table.generation ? file : NULL;
}

void cm_file_add(int fd, int other)
{
        struct cm_file *file = is_descriptor(fd) ? table.of_descriptor[fd] : NULL;

        if (!file || !is_descriptor(other))
                return;
        file->descriptors++;
        table.of_descriptor[other] = file;
}

struct cm_file *cm_file_drop(int fd)
{
        struct cm_file *file = cm_file_of(fd);

        if (is_descriptor(fd))
                table.of_descriptor[fd] = NULL;
        if (!file || !--file->descriptors)
                return file;
        if (file->fd == fd)
                for (int other = 0; other < DESCRIPTORS; other++)
                        if (table.of_descriptor[other] == file)
                                file->fd = other;
        return NULL;
}

void cm_file_free(struct cm_file *file)
{
        struct cm_file **at = &table.files;

        while (*at != file)
                at = &(*at)->next;
        *at = file->next;
        free(file);
}

/* --- ids */

struct cm_id *cm_id_new(struct cm_file *file, uint16_t space, uint8_t type)
{
        struct cm_id *id = calloc(1, sizeof *id);

        while (table.free_id < CM_IDS && table.ids[table.free_id])
                table.free_id++;
        if (!id || table.free_id == CM_IDS) {
                free(id);
                return NULL;
        }
        table.serial = table.serial % SERIALS + 1;
        id->place = table.free_id;
        id->number = table.serial << 16 | id->place;
        id->file = file;
        id->space = space;
        id->type = type;
        id->gid = -1;
        table.ids[id->place] = id;
        if (table.end_id <= id->place)
                table.end_id = id->place + 1;
        return id;
}

void cm_id_free(struct cm_id *id)
{
        table.ids[id->place] = NULL;
        if (id->place < table.free_id)
                table.free_id = id->place;
        free(id->sent);
        free(id);
}

int cm_id_find(const struct cm_file *file, uint32_t place, struct cm_id **found)
{
        struct cm_id *id = place < CM_IDS ? table.ids[place] : NULL;

        *found = NULL;
        if (!id)
                return -ENOENT;
        if (id->file != file)
                return -EINVAL;
        *found = id;
        return 0;
}

struct cm_id *cm_id_of(uint32_t number)
{
        struct cm_id *id = table.ids[number % CM_IDS];

        return number && id && id->number == number ? id : NULL;
}

struct cm_id *cm_id_from(uint32_t place)
{
        for (; place < table.end_id; place++)
                if (table.ids[place])
                        return table.ids[place];
        return NULL;
}

/* --- groups */

struct cm_group *cm_group_new(struct cm_id *id)
{
        struct cm_group *group = calloc(1, sizeof *group);

        while (table.free_group < CM_GROUPS && table.groups[table.free_group])
                table.free_group++;
        if (!group || table.free_group == CM_GROUPS) {
                free(group);
                return NULL;
        }
        group->id = id;
        group->place = table.free_group;
        table.groups[group->place] = group;
        return group;
}

void cm_group_free(struct cm_group *group)
{
        table.groups[group->place] = NULL;
        if (group->place < table.free_group)
                table.free_group = group->place;
        free(group);
}

int cm_group_find(const struct cm_file *file, uint32_t place, struct cm_group **found)
{
        *found = place < CM_GROUPS ? table.groups[place] : NULL;
        if (!*found)
                return -ENOENT;
        return (*found)->id->file == file ? 0 : -EINVAL;
}

struct cm_group *cm_group_of(const struct cm_id *id)
{
        for (uint32_t place = 0; place < CM_GROUPS; place++)
                if (table.groups[place] && table.groups[place]->id == id)
                        return table.groups[place];
        return NULL;
}

/* --- events */

struct cm_event *cm_event_new(struct cm_id *owner, uint32_t kind, int status)
{
        struct cm_event *event = owner->uid ? calloc(1, sizeof *event) : NULL;

        if (!event)
                return NULL;
        event->owner = owner;
        event->said.uid = owner->uid;
        event->said.id = owner->place;
        event->said.event = kind;
        event->said.status = (uint32_t)status;
        return event;
}

static void append(struct cm_file *file, struct cm_event *event)
{
        event->next = NULL;
        *file->last = event;
        file->last = &event->next;
        counter_add(file->fd);
}

/* The link that leads to it is given. */
static struct cm_event *unlink_event(struct cm_file *file, struct cm_event **at)
{
        struct cm_event *event = *at;

        *at = event->next;
        if (!*at)
                file->last = at;
        return event;
}

void cm_event_put(struct cm_event *event)
{
        append(event->owner->file, event);
}

void cm_event_tell(struct cm_id *owner, uint32_t kind, int status)
{
        struct cm_event *event = cm_event_new(owner, kind, status);

        if (event)
                cm_event_put(event);
}

struct cm_event *cm_event_first(const struct cm_file *file)
{
        return file->first;
}

void cm_event_take(struct cm_event *event)
{
        struct cm_file *file = event->owner->file;

        unlink_event(file, &file->first);
        event->owner->events_reported++;
        if (event->group)
                event->group->events_reported++;
        if (event->asking) {
                event->asking->file = file;
                event->owner->backlog++;
        }
        free(event);
}

static struct cm_event **find_event(struct cm_file *file, const struct cm_id *owner,
                                    const struct cm_group *group)
{
        struct cm_event **at = &file->first;

        while (*at && ((*at)->owner != owner || (group && (*at)->group != group)))
                at = &(*at)->next;
        return at;
}

struct cm_event *cm_event_withdraw(struct cm_id *owner, const struct cm_group *group)
{
        struct cm_event **at = find_event(owner->file, owner, group);

        if (!*at)
                return NULL;
        counter_drop(owner->file->fd);
        return unlink_event(owner->file, at);
}

void cm_id_move(struct cm_id *id, struct cm_file *file)
{
        struct cm_file *before = id->file;
        struct cm_event **at;

        while (*(at = find_event(before, id, NULL))) {
                counter_drop(before->fd);
                append(file, unlink_event(before, at));
        }
        id->file = file;
}

void cm_table_forget(void)
{
        uint32_t generation = table.generation + 1;

        cm_mutex = (struct mutex){0};
        table.files = NULL;
        table.generation = generation;
        table.free_id = table.free_group = 0;
        memset(table.ids, 0, table.end_id * sizeof *table.ids);
        table.end_id = 0;
        memset(table.groups, 0, sizeof table.groups);
}
