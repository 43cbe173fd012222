#include "lent_files.h"

#include "answers.h"
#include "transport.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { BUCKETS = 1024, COMPLAIN_EVERY = 60000 /* ms */ };

static struct node buckets[BUCKETS];
static void (*take_back)(struct lent_file *file);

void lent_files_start(void (*ends)(struct lent_file *file))
{
        take_back = ends;
        for (int i = 0; i < BUCKETS; i++)
                list_init(&buckets[i]);
}

static struct node *bucket_of(uint64_t number)
{
        return &buckets[number % BUCKETS];
}

static struct lent_file *find(uint64_t number)
{
        struct node *bucket = bucket_of(number);

        EACH(node, bucket) {
                struct lent_file *file = OF(node, struct lent_file, same);

                if (file->number == number)
                        return file;
        }
        return NULL;
}

void lent_file_add(const struct relay_file *message, int memory)
{
        struct lent_file *file;

        if (find(message->file))
                relay_die("the router's file", EEXIST);
        file = relay_memory(sizeof *file, "memory for a file");
        file->number = message->file;
        file->token = message->token;
        file->owner = message->owner;
        file->writable = message->writable;
        file->memory = memory;
        list_init(&file->same);
        list_init(&file->grants);
        list_add(bucket_of(file->number), &file->same);
}

static void deregister(struct lent_file *file)
{
        if (file->registration)
                file->transport->deregister_file(file);
        file->registration = NULL;
}

static void tell_ended(uint64_t number)
{
        struct relay_file message = {.file = number};

        answer(&message, sizeof message, R_FILE_ENDED);
}

static void free_if_unused(struct lent_file *file)
{
        if (!file->ended || file->users)
                return;
        deregister(file);
        if (file->base)
                munmap(file->base, file->size);
        close(file->memory);
        list_remove(&file->same);
        tell_ended(file->number);
        free(file);
}

void lent_file_end(uint64_t number)
{
        struct lent_file *file = find(number);

        if (!file) {
                tell_ended(number);
                return;
        }
        file->ended = true;
        take_back(file);
        free_if_unused(file);
}

struct lent_file *lent_file_find(uint64_t number, uint64_t owner)
{
        struct lent_file *file = find(number);

        return file && file->owner == owner && !file->ended ? file : NULL;
}

/* A file that could shrink would end the relay. */
static bool map(struct lent_file *file)
{
        int seals = fcntl(file->memory, F_GET_SEALS);
        off_t size = lseek(file->memory, 0, SEEK_END);
        void *got;

        if (seals < 0 || !(seals & F_SEAL_SHRINK) || size <= LENT_FILE_HEADER ||
            size > LENT_FILE_HEADER + LENT_FILE_MOST)
                return false;
        got = mmap(NULL, (size_t)size, PROT_READ | (file->writable ? PROT_WRITE : 0),
                   MAP_SHARED | MAP_NORESERVE, file->memory, 0);
        if (got == MAP_FAILED)
                return false;
        madvise(got, (size_t)size, MADV_DONTDUMP);
        file->base = got;
        file->size = (size_t)size;
        return true;
}

/* A process can make new files for ever. */
static void complain(const char *text)
{
        static uint64_t next;
        uint64_t present = now();

        if (present < next)
                return;
        next = present + COMPLAIN_EVERY * UINT64_C(1000000);
        fprintf(stderr, "freeflow-relay: %s; such writes go through rings\n", text);
}

static bool reach_file(struct lent_file *file, const struct transport *transport)
{
        char text[RELAY_TEXT];

        if (!file->base && !map(file))
                return false;
        file->transport = transport;
        if (!transport->register_file(file, text))
                return true;
        complain(text);
        return false;
}

bool lent_file_use(struct lent_file *file, const struct transport *transport)
{
        if (file->refused || (file->registration && file->transport != transport))
                return false;
        if (!file->registration && !reach_file(file, transport)) {
                file->refused = true;
                return false;
        }
        file->users++;
        return true;
}

void lent_file_leave(struct lent_file *file)
{
        file->users--;
        free_if_unused(file);
}

void lent_files_deregister(const struct transport *transport)
{
        for (int i = 0; i < BUCKETS; i++)
                EACH(node, &buckets[i]) {
                        struct lent_file *file = OF(node, struct lent_file, same);

                        if (file->transport == transport)
                                deregister(file);
                }
}
