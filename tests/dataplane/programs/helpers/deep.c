/* A library whose calls on a connection go to the C library that it is bound to. */
#include <unistd.h>

void library_echo(int fd);
void library_says_bye(int fd);

static int bye = -1;

void library_echo(int fd)
{
        char bytes[4096];
        ssize_t got;

        while ((got = read(fd, bytes, sizeof bytes)) > 0)
                for (ssize_t done = 0; done < got;) {
                        ssize_t put = write(fd, bytes + done, (size_t)(got - done));

                        if (put < 0)
                                return;
                        done += put;
                }
}

void library_says_bye(int fd)
{
        bye = fd;
}

__attribute__((destructor)) static void leave(void)
{
        if (bye >= 0)
                (void)!write(bye, "bye", 3);
}
