#include "cm_address.h"

#include "port.h"

#include "../library/sys.h"

#include <errno.h>
#include <string.h>

enum {
        IB_FAMILY = 27, /* AF_IB */
        IB_SIZE = 48,   /* of struct sockaddr_ib */
        MAPPED = 12,    /* bytes before the address in an IPv4-mapped one */
        DISCARD = 9,    /* a port: no packet is sent to it */
};

static const uint8_t mapped[MAPPED] = {[10] = 0xff, [11] = 0xff};

size_t cm_address_size(uint16_t family)
{
        switch (family) {
        case AF_INET:
                return sizeof(struct sockaddr_in);
        case AF_INET6:
                return sizeof(struct sockaddr_in6);
        case IB_FAMILY:
                return IB_SIZE;
        default:
                return 0;
        }
}

bool cm_address_read(union cm_address *to, const void *from, size_t room)
{
        uint16_t family;
        size_t size;

        memcpy(&family, from, sizeof family);
        size = cm_address_size(family);
        *to = (union cm_address){.any.sa_family = 0};
        if (!size || size > room || size > sizeof *to)
                return false;
        memcpy(to, from, size);
        return true;
}

bool cm_address_is_loopback(const union cm_address *address)
{
        if (address->any.sa_family == AF_INET)
                return (ntohl(address->four.sin_addr.s_addr) >> 24) == IN_LOOPBACKNET;
        return IN6_IS_ADDR_LOOPBACK(&address->six.sin6_addr);
}

bool cm_address_is_any(const union cm_address *address)
{
        if (cm_address_is_loopback(address))
                return true;
        if (address->any.sa_family == AF_INET)
                return !address->four.sin_addr.s_addr;
        return IN6_IS_ADDR_UNSPECIFIED(&address->six.sin6_addr);
}

bool cm_address_is_multicast(const union cm_address *address)
{
        if (address->any.sa_family == AF_INET)
                return IN_MULTICAST(ntohl(address->four.sin_addr.s_addr));
        return IN6_IS_ADDR_MULTICAST(&address->six.sin6_addr);
}

uint16_t cm_address_port(const union cm_address *address)
{
        return ntohs(address->any.sa_family == AF_INET ? address->four.sin_port : address->six.sin6_port);
}

void cm_address_set_port(union cm_address *address, uint16_t port)
{
        if (address->any.sa_family == AF_INET)
                address->four.sin_port = htons(port);
        else
                address->six.sin6_port = htons(port);
}

union ibv_gid cm_address_gid(const union cm_address *address)
{
        union ibv_gid gid = {.raw = {0}};

        if (address->any.sa_family == AF_INET) {
                memcpy(gid.raw, mapped, MAPPED);
                memcpy(gid.raw + MAPPED, &address->four.sin_addr, sizeof address->four.sin_addr);
        } else if (address->any.sa_family == AF_INET6) {
                memcpy(gid.raw, &address->six.sin6_addr, sizeof gid.raw);
        }
        return gid;
}

union cm_address cm_address_of(const union ibv_gid *gid, uint16_t port)
{
        union cm_address address = {.any.sa_family = AF_INET6};

        if (memcmp(gid->raw, mapped, MAPPED)) {
                memcpy(&address.six.sin6_addr, gid->raw, sizeof gid->raw);
        } else {
                address.four.sin_family = AF_INET;
                memcpy(&address.four.sin_addr, gid->raw + MAPPED, sizeof address.four.sin_addr);
        }
        cm_address_set_port(&address, port);
        return address;
}

int cm_address_source(union cm_address *from, const union cm_address *to)
{
        long socket = sys_3(SYS_socket, to->any.sa_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        socklen_t size = sizeof *from;
        union cm_address peer = *to, own = {.any.sa_family = 0};
        long failed;

        if (socket < 0)
                return (int)socket;
        cm_address_set_port(&peer, DISCARD);
        failed = sys_3(SYS_connect, socket, &peer, cm_address_size(to->any.sa_family));
        if (!failed)
                failed = sys_3(SYS_getsockname, socket, &own, &size);
        sys_1(SYS_close, socket);
        if (failed)
                return (int)failed;
        cm_address_set_port(&own, cm_address_port(from));
        *from = own;
        return 0;
}

int cm_address_place(const union cm_address *address)
{
        union ibv_gid gid = cm_address_gid(address);
        uint32_t place;

        return port_find(&gid, &place) ? (int)place : -1;
}

bool cm_address_own(union cm_address *to, uint16_t family)
{
        union ibv_gid gid;

        for (uint32_t place = 0; place < PORT_GIDS; place++) {
                if (!port_gid(place, &gid))
                        continue;
                *to = cm_address_of(&gid, 0);
                if (to->any.sa_family == family)
                        return true;
        }
        return false;
}
