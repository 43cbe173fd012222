/* Addresses of connections: IPv4 and IPv6, with a port. Each is a GID as well. */
#ifndef FREEFLOW_CM_ADDRESS_H
#define FREEFLOW_CM_ADDRESS_H

#include "verb.h"

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

/* `any.sa_family` 0: none. */
union cm_address {
        struct sockaddr any;
        struct sockaddr_in four;
        struct sockaddr_in6 six;
};

/* The size that the kernel says an address of this family has; 0: it is none of rdma_cm's. */
size_t cm_address_size(uint16_t family);
/* Read one from so many bytes. False: there is none that we serve. */
bool cm_address_read(union cm_address *to, const void *from, size_t room);
bool cm_address_is_loopback(const union cm_address *address);
/* The unspecified address or one of loopback, which no device has: as in cma.c both stand for any
 * of the container's own. */
bool cm_address_is_any(const union cm_address *address);
bool cm_address_is_multicast(const union cm_address *address);
/* In host byte order. */
uint16_t cm_address_port(const union cm_address *address);
void cm_address_set_port(union cm_address *address, uint16_t port);
/* 0 for no address. */
union ibv_gid cm_address_gid(const union cm_address *address);
union cm_address cm_address_of(const union ibv_gid *gid, uint16_t port);
/* The address that the kernel's routes choose for packets to another one, with the port that `from`
 * has. Returns 0 or a negative errno. */
int cm_address_source(union cm_address *from, const union cm_address *to);
/* The place of the port's GID that an address is; -1: it is none of the container's. */
int cm_address_place(const union cm_address *address);
/* Any of the container's own of this family. False: there is none. */
bool cm_address_own(union cm_address *to, uint16_t family);

#endif
