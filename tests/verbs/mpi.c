/* A program of MPI: every rank exchanges messages of many sizes with every other, and all add up
 * what they have.
 *
 *      mpirun -n RANKS mpi
 *
 * Prints "RANKS ranks" at the end. The exit code is 1 if a byte is wrong.
 */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

enum { MOST = 3 << 20, NUMBERS = 100000, ROUNDS = 200 };

static unsigned char sent[MOST], received[MOST];
static double numbers[NUMBERS], sums[NUMBERS];
static int rank, ranks;

static void fail(const char *what, int where)
{
        fprintf(stderr, "rank %d: %s %d\n", rank, what, where);
        MPI_Abort(MPI_COMM_WORLD, 1);
}

static unsigned char byte_of(int from, int size, int place)
{
        return (unsigned char)(from * 31 + size * 7 + place * 13 + place / 251);
}

static void exchange(int other, int size)
{
        for (int i = 0; i < size; i++)
                sent[i] = byte_of(rank, size, i);
        MPI_Sendrecv(sent, size, MPI_BYTE, other, size, received, size, MPI_BYTE, other, size, MPI_COMM_WORLD,
                     MPI_STATUS_IGNORE);
        for (int i = 0; i < size; i++)
                if (received[i] != byte_of(other, size, i))
                        fail("another byte at", i);
}

static void play(int other)
{
        int ball = 0;

        for (int i = 0; i < ROUNDS; i++) {
                if (rank < other)
                        MPI_Send(&i, 1, MPI_INT, other, 0, MPI_COMM_WORLD);
                MPI_Recv(&ball, 1, MPI_INT, other, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
                if (ball != i)
                        fail("another ball in round", i);
                if (rank > other)
                        MPI_Send(&i, 1, MPI_INT, other, 0, MPI_COMM_WORLD);
        }
}

static void add_up(void)
{
        for (int i = 0; i < NUMBERS; i++)
                numbers[i] = rank + i;
        MPI_Allreduce(numbers, sums, NUMBERS, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
        for (int i = 0; i < NUMBERS; i++)
                if (sums[i] != (double)ranks * i + ranks * (ranks - 1) / 2)
                        fail("another sum at", i);
}

int main(int argc, char **argv)
{
        static const int sizes[] = {1, 8, 1000, 8192, 65536, 1 << 20, MOST};

        MPI_Init(&argc, &argv);
        MPI_Comm_rank(MPI_COMM_WORLD, &rank);
        MPI_Comm_size(MPI_COMM_WORLD, &ranks);
        for (int step = 1; step < ranks; step++) {
                /* Pairs, if the number of ranks is a power of two. */
                int other = rank ^ step;

                for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
                        exchange(other, sizes[i]);
                play(other);
        }
        add_up();
        MPI_Barrier(MPI_COMM_WORLD);
        if (!rank)
                printf("%d ranks\n", ranks);
        MPI_Finalize();
        return 0;
}
