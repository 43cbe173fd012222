#include "interfaces.h"

#include "../library/sys.h"

#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sockios.h>
#include <string.h>
#include <sys/socket.h>

enum { ANSWER = 8192, MAPPED = 12 /* bytes before the address in an IPv4-mapped one */ };

static bool is_mapped(const union ibv_gid *gid)
{
        static const uint8_t prefix[MAPPED] = {[10] = 0xff, [11] = 0xff};

        return memcmp(gid->raw, prefix, sizeof prefix) == 0;
}

/* Does this message say that an interface has the address? */
static bool has_address(const struct nlmsghdr *message, const void *address, uint32_t size)
{
        const struct ifaddrmsg *found = NLMSG_DATA(message);
        const struct rtattr *attribute = IFA_RTA(found);
        uint32_t left = IFA_PAYLOAD(message);
        /* An IPv4 interface that leads to one peer calls that one's its address. */
        uint16_t own = size == 4 ? IFA_LOCAL : IFA_ADDRESS;

        for (; RTA_OK(attribute, left); attribute = RTA_NEXT(attribute, left))
                if (attribute->rta_type == own && RTA_PAYLOAD(attribute) == size &&
                    memcmp(RTA_DATA(attribute), address, size) == 0)
                        return true;
        return false;
}

/* Read the kernel's list of addresses until the one is found. */
static uint32_t read_list(int netlink, const void *address, uint32_t size)
{
        _Alignas(NLMSG_ALIGNTO) char answer[ANSWER];

        for (;;) {
                const struct nlmsghdr *message = (const struct nlmsghdr *)answer;
                long got = sys_6(SYS_recvfrom, netlink, answer, sizeof answer, 0, 0, 0);

                if (got <= 0)
                        return 0;
                for (uint32_t left = (uint32_t)got; NLMSG_OK(message, left);
                     message = NLMSG_NEXT(message, left)) {
                        if (message->nlmsg_type != RTM_NEWADDR)
                                return 0; /* the end, or an error */
                        if (has_address(message, address, size))
                                return ((const struct ifaddrmsg *)NLMSG_DATA(message))->ifa_index;
                }
        }
}

uint32_t interface_of(const union ibv_gid *gid)
{
        bool mapped = is_mapped(gid);
        struct {
                struct nlmsghdr header;
                struct ifaddrmsg wanted;
        } request = {
            .header = {.nlmsg_len = sizeof request,
                       .nlmsg_type = RTM_GETADDR,
                       .nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP},
            .wanted = {.ifa_family = mapped ? AF_INET : AF_INET6},
        };
        const uint8_t *address = gid->raw + (mapped ? MAPPED : 0);
        long netlink = sys_3(SYS_socket, AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
        uint32_t number = 0;

        if (netlink < 0)
                return 0;
        if (sys_6(SYS_sendto, netlink, &request, sizeof request, 0, 0, 0) == sizeof request)
                number = read_list((int)netlink, address, mapped ? 4 : 16);
        sys_1(SYS_close, netlink);
        return number;
}

bool interface_name(uint32_t number, char name[IFNAMSIZ])
{
        long any = sys_3(SYS_socket, AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        struct ifreq request = {.ifr_ifindex = (int)number};
        long failed;

        if (any < 0)
                return false;
        failed = sys_3(SYS_ioctl, any, SIOCGIFNAME, &request);
        sys_1(SYS_close, any);
        memcpy(name, request.ifr_name, IFNAMSIZ);
        return !failed;
}
