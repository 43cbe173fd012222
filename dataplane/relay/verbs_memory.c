#include "verbs_memory.h"

#include <errno.h>
#include <stdlib.h>

static void deregister(struct registration *registration)
{
        if (registration->small) {
                relay.counters[COUNT_REGISTERED] -= registration->small->length;
                verbs.dereg_mr(registration->small);
        }
        if (registration->bulk) {
                relay.counters[COUNT_REGISTERED] -= registration->bulk->length;
                verbs.dereg_mr(registration->bulk);
        }
        verbs_put_device(registration->device);
        free(registration);
}

void verbs_deregister(struct mirror *m)
{
        deregister(m->registration);
        m->registration = NULL;
}

static struct ibv_mr *register_memory(void *from, size_t size)
{
        struct ibv_mr *region =
            verbs.reg_mr(verbs_device->domain, from, size, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);

        count(COUNT_CALLS, 1);
        if (region)
                count(COUNT_REGISTERED, size);
        return region;
}

int verbs_register_rings(struct mirror *m, struct wire_place *place, char *text)
{
        struct registration *registration;

        if (!verbs_device)
                return relay_refuse(text, ENODEV, "the RDMA device is gone");
        registration = relay_memory(sizeof *registration, "memory for a connection");
        registration->device = verbs_device;
        verbs_device->users++;
        errno = 0;
        registration->small = register_memory((char *)m->out + RING_HEADER, SIDES * PAGE - RING_HEADER);
        if (registration->small)
                registration->bulk = register_memory(m->out_bulk, (size_t)SIDES * m->size);
        if (!registration->bulk) {
                int error = verbs_fail(text, "registering the rings' memory (RLIMIT_MEMLOCK, CAP_IPC_LOCK?)");

                deregister(registration);
                return error;
        }
        place->to.verbs.small = (uintptr_t)m->in + RING_HEADER;
        place->to.verbs.bulk = (uintptr_t)m->in_bulk;
        place->to.verbs.small_key = registration->small->rkey;
        place->to.verbs.bulk_key = registration->bulk->rkey;
        m->registration = registration;
        return 0;
}

int verbs_attach(struct mirror *m, const struct wire_place *place, UNUSED char *text)
{
        struct target *target = relay_memory(sizeof *target, "memory for a connection");

        *target = (struct target){
            .small = place->to.verbs.small,
            .bulk = place->to.verbs.bulk,
            .small_key = place->to.verbs.small_key,
            .bulk_key = place->to.verbs.bulk_key,
        };
        m->target = target;
        return 0;
}

void verbs_detach(struct mirror *m)
{
        free(m->target);
        m->target = NULL;
}

int verbs_register_file(struct lent_file *file, char *text)
{
        struct file_registration *registration;
        int access = file->writable ? IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE : 0;

        if (!verbs_device)
                return relay_refuse(text, ENODEV, "the RDMA device is gone");
        registration = relay_memory(sizeof *registration, "memory for a file");
        errno = 0;
        /* The header is its process's alone: by what is there it knows whether all has come. */
        registration->region = verbs.reg_mr(verbs_device->domain, file->base + LENT_FILE_HEADER,
                                            file->size - LENT_FILE_HEADER, access);
        count(COUNT_CALLS, 1);
        if (!registration->region) {
                free(registration);
                return verbs_fail(text, "registering a process's memory");
        }
        registration->device = verbs_device;
        verbs_device->users++;
        count(COUNT_REGISTERED, file->size);
        file->registration = registration;
        return 0;
}

void verbs_deregister_file(struct lent_file *file)
{
        struct file_registration *registration = file->registration;

        relay.counters[COUNT_REGISTERED] -= file->size;
        verbs.dereg_mr(registration->region);
        verbs_put_device(registration->device);
        free(registration);
}

void verbs_place_file(const struct lent_file *file, uint64_t *address, uint64_t *key)
{
        const struct file_registration *registration = file->registration;

        *address = (uintptr_t)file->base;
        *key = registration->region->rkey;
}

void *verbs_reach(uint64_t address, uint64_t key, UNUSED uint64_t size)
{
        struct reached_file *reached = relay_memory(sizeof *reached, "memory for a file of a peer");

        *reached = (struct reached_file){.address = address, .key = (uint32_t)key};
        return reached;
}

void verbs_unreach(void *reached)
{
        free(reached);
}
