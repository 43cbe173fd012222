#include "files.h"

#include "extents.h"
#include "interfaces.h"
#include "port.h"
#include "virtual.h"

#include "../library/sys.h"

#include <dlfcn.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysmacros.h>
#include <unistd.h>

/* Programs look whether it is a character device that they may use, and nothing more. */
#define DEVICE_FILE "/dev/infiniband/" DEVICE_NAME
#define SOME_DEVICE "/dev/null"

enum { READ_ONLY = 0444 };

/* Words are put one behind the other. */
struct line {
        char *text;
        size_t length;
};

static void add(struct line *line, const char *word)
{
        size_t length = strlen(word);

        if (line->length + length >= FILE_TEXT)
                return;
        memcpy(line->text + line->length, word, length + 1);
        line->length += length;
}

/* Bytes as hexadecimal numbers of 16 bits, with colons in between. */
static void add_groups(struct line *line, const uint8_t *bytes, size_t size)
{
        static const char digits[] = "0123456789abcdef";

        for (size_t i = 0; i < size; i++) {
                const char two[] = {digits[bytes[i] / 16], digits[bytes[i] % 16], 0};

                if (i && i % 2 == 0)
                        add(line, ":");
                add(line, two);
        }
}

/* The place in the table of GIDs that a file's name is; -1: it is none. */
static int place_of(const char *name)
{
        int place = 0;

        if (!*name || (*name == '0' && name[1]))
                return -1;
        for (; *name; name++) {
                if (*name < '0' || *name > '9' || place >= PORT_GIDS)
                        return -1;
                place = place * 10 + (*name - '0');
        }
        return place < PORT_GIDS ? place : -1;
}

static bool write_gid(struct line *line, uint32_t place)
{
        union ibv_gid gid = {.raw = {0}};

        port_gid(place, &gid);
        add_groups(line, gid.raw, sizeof gid.raw);
        return true;
}

static bool write_gid_type(struct line *line, uint32_t place)
{
        union ibv_gid gid;

        add(line, "RoCE v2");
        return port_gid(place, &gid);
}

static bool write_gid_interface(struct line *line, uint32_t place)
{
        char name[IFNAMSIZ];
        union ibv_gid gid;

        if (!port_gid(place, &gid) || !interface_name(interface_of(&gid), name))
                return false;
        add(line, name);
        return true;
}

static bool write_guid(struct line *line)
{
        __be64 guid = port_guid();

        add_groups(line, (const uint8_t *)&guid, sizeof guid);
        return true;
}

static bool write_state(struct line *line)
{
        add(line, port_is_active() ? "4: ACTIVE" : "1: DOWN");
        return true;
}

/* Files with a text of their own, or one that says what the port says. */
static const struct {
        const char *path;
        const char *text;
        bool (*write)(struct line *line);
} files[] = {
    {SYSFS_DEVICE "/node_type", .text = "1: CA"},
    {SYSFS_DEVICE "/node_guid", .write = write_guid},
    {SYSFS_DEVICE "/sys_image_guid", .write = write_guid},
    {SYSFS_DEVICE "/node_desc", .text = DEVICE_NAME},
    {SYSFS_DEVICE "/fw_ver", .text = "1.0"},
    {SYSFS_DEVICE "/device/numa_node", .text = "-1"},
    {SYSFS_DEVICE "/ports/1/state", .write = write_state},
    {SYSFS_DEVICE "/ports/1/phys_state", .text = "5: LinkUp"},
    {SYSFS_DEVICE "/ports/1/link_layer", .text = "Ethernet"},
    {SYSFS_DEVICE "/ports/1/rate", .text = "100 Gb/sec (4X EDR)"},
    {SYSFS_DEVICE "/ports/1/lid", .text = "0x0"},
    {SYSFS_DEVICE "/ports/1/lid_mask_count", .text = "0"},
    {SYSFS_DEVICE "/ports/1/sm_lid", .text = "0x0"},
    {SYSFS_DEVICE "/ports/1/sm_sl", .text = "0"},
    {SYSFS_DEVICE "/ports/1/cap_mask", .text = "0x04010000"},
    {SYSFS_DEVICE "/ports/1/pkeys/0", .text = "0xffff"},
    {SYSFS_VERBS "/ibdev", .text = DEVICE_NAME},
    {SYSFS_VERBS "/abi_version", .text = "1"},
};

/* Folders with a file for each place of the table of GIDs. */
static const struct {
        const char *path;
        bool (*write)(struct line *line, uint32_t place);
} folders[] = {
    {SYSFS_DEVICE "/ports/1/gids/", write_gid},
    {SYSFS_DEVICE "/ports/1/gid_attrs/types/", write_gid_type},
    {SYSFS_DEVICE "/ports/1/gid_attrs/ndevs/", write_gid_interface},
};

static bool write_text(struct line *line, const char *path)
{
        for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
                if (strcmp(path, files[i].path))
                        continue;
                if (files[i].write)
                        return files[i].write(line);
                add(line, files[i].text);
                return true;
        }
        for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
                size_t length = strlen(folders[i].path);
                int place;

                if (strncmp(path, folders[i].path, length))
                        continue;
                place = place_of(path + length);
                return place >= 0 && folders[i].write(line, (uint32_t)place);
        }
        return false;
}

bool file_text(const char *path, char text[FILE_TEXT])
{
        struct line line = {.text = text};

        if (!write_text(&line, path))
                return false;
        add(&line, "\n");
        return true;
}

/* --- for the companion */

static const struct file_device *_Atomic served;

static bool is_served(const char *path)
{
        const struct file_device *device = atomic_load(&served);

        return device && !strcmp(path, device->path);
}

static const char *other_file(const char *path)
{
        return !strcmp(path, DEVICE_FILE) || is_served(path) ? SOME_DEVICE : NULL;
}

/* A text such as "10:122"; 0: it is none. */
static uint64_t number_in(const char *text)
{
        unsigned parts[2] = {0};
        int part = 0;

        for (; *text && *text != '\n'; text++) {
                if (*text == ':' && !part)
                        part = 1;
                else if (*text >= '0' && *text <= '9')
                        parts[part] = parts[part] * 10 + (unsigned)(*text - '0');
                else
                        return 0;
        }
        return part ? makedev(parts[0], parts[1]) : 0;
}

/* librdmacm compares the number with what the kernel says of the real device. */
static const char *disguise_of(int fd, uint64_t *number)
{
        const struct file_device *device = atomic_load(&served);
        char text[FILE_TEXT] = "";
        long file;

        if (!device || !device->is(fd))
                return NULL;
        file = sys_4(SYS_openat, AT_FDCWD, device->number, O_RDONLY | O_CLOEXEC, 0);
        if (file >= 0) {
                sys_3(SYS_read, file, text, sizeof text - 1);
                sys_1(SYS_close, file);
                *number = number_in(text);
        }
        return SOME_DEVICE;
}

static int open_text(const char *text, int flags)
{
        size_t length = strlen(text);
        long fd;

        if ((flags & O_ACCMODE) != O_RDONLY)
                return -EACCES;
        fd = sys_2(SYS_memfd_create, DEVICE_NAME, flags & O_CLOEXEC ? MFD_CLOEXEC : 0);
        if (fd < 0)
                return (int)fd;
        if (sys_4(SYS_pwrite64, fd, text, length, 0) == (long)length && !sys_2(SYS_fchmod, fd, READ_ONLY))
                return (int)fd;
        sys_1(SYS_close, fd);
        return -EIO;
}

static int open_file(const char *path, int flags)
{
        char text[FILE_TEXT];

        /* Most paths are others. */
        if (!strncmp(path, SYSFS_FOLDER, strlen(SYSFS_FOLDER)))
                return file_text(path, text) ? open_text(text, flags) : -ENOENT;
        return is_served(path) ? atomic_load(&served)->open(flags) : -ENOENT;
}

void files_show(void)
{
        static const struct virtual_files shown = {.other = other_file,
                                                   .open = open_file,
                                                   .disguise = disguise_of,
                                                   .advise = extents_advise,
                                                   .move = extents_move};
        virtual_files *wrapped = dlsym(RTLD_DEFAULT, VIRTUAL_NAME);

        if (wrapped)
                atomic_store_explicit(wrapped, &shown, memory_order_release);
}

void files_serve(const struct file_device *device)
{
        atomic_store(&served, device);
}
