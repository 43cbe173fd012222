#include "transports.h"

#include "context.h"
#include "link.h"

#include <errno.h>

enum { KINDS = RELAY_TCP + 1 };

/* By kind; NULL: not open. */
static const struct transport *opened[KINDS];
static uint32_t spins[KINDS]; /* microseconds, of those that are open */

/* NULL: there is no such transport. */
static const struct transport *transport_of(uint32_t kind)
{
        switch (kind) {
        case RELAY_VERBS:
                return &verbs_transport;
#ifdef FREEFLOW_TEST
        case RELAY_LOOPBACK:
                return &faulty_transport;
#elif defined FREEFLOW_MEMORY
        case RELAY_LOOPBACK:
                return &loopback_transport;
#endif
        case RELAY_TCP:
#ifdef FREEFLOW_TEST
                return &faulty_tcp_transport;
#else
                return &tcp_transport;
#endif
        default:
                return NULL;
        }
}

int transports_open(const struct relay_open *request, uint32_t *mtu, char *text)
{
        const struct transport *transport = transport_of(request->transport);
        int error;

        if (!transport)
                return relay_refuse(text, EINVAL, "there is no such transport");
        if (links_have_channels(transport))
                return relay_refuse(text, EBUSY, "links still use the device that is open");
        if (opened[transport->kind])
                transport->close();
        opened[transport->kind] = NULL;
        error = transport->open(request, mtu, text);
        if (!error)
                opened[transport->kind] = transport;
        spins[transport->kind] = error ? 0 : request->spin;
        return error;
}

uint32_t transports_spin(void)
{
        uint32_t most = 0;

        for (int i = 0; i < KINDS; i++)
                most = spins[i] > most ? spins[i] : most;
        return most;
}

bool transports_yield(void)
{
        for (int i = 0; i < KINDS; i++)
                if (opened[i] && i != RELAY_TCP)
                        return false;
        return true;
}

const struct transport *transport_opened(uint32_t kind)
{
        return kind < KINDS ? opened[kind] : NULL;
}

bool transports_poll(void)
{
        bool any = false;

        for (int i = 0; i < KINDS; i++)
                if (opened[i])
                        any = opened[i]->poll() || any;
        return any;
}

bool transports_flush(void)
{
        bool any = false;

        for (int i = 0; i < KINDS; i++)
                if (opened[i] && opened[i]->flush)
                        any = opened[i]->flush() || any;
        return any;
}

bool transports_arm(void)
{
        bool nothing = true;

        for (int i = 0; i < KINDS; i++)
                if (opened[i])
                        nothing = opened[i]->arm() && nothing;
        return nothing;
}

uint64_t transports_tick(uint64_t present)
{
        uint64_t first = 0;

        for (int i = 0; i < KINDS; i++) {
                uint64_t due = opened[i] && opened[i]->tick ? opened[i]->tick(present) : 0;

                if (due && (!first || due < first))
                        first = due;
        }
        return first;
}
