/* A link's rate as a number of libibverbs, as a multiple of 2.5 Gbit/s, and in Mbit/s. */
#include "verb.h"

/* InfiniBand architecture specification, release 1.7, volume 1: the encoded rates. A rate without a
 * multiple is none of 2.5 Gbit/s. By number: not all headers name the youngest. */
static const struct rate {
        int number, multiple, mbps;
} rates[] = {
    {2, 1, 2500},     {5, 2, 5000},      {3, 4, 10000},     {6, 8, 20000},     {4, 12, 30000},
    {7, 16, 40000},   {8, 24, 60000},    {9, 32, 80000},    {10, 48, 120000},  {19, 11, 28125},
    {20, 20, 53125},  {21, 160, 425000}, {22, 240, 637500}, {23, 320, 850000}, {24, 480, 1275000},
    {11, -1, 14062},  {12, -1, 56250},   {13, -1, 112500},  {14, -1, 168750},  {15, -1, 25781},
    {16, -1, 103125}, {17, -1, 206250},  {18, -1, 309375},
};

static const struct rate *of_number(int number)
{
        static const struct rate none = {0, -1, -1};

        for (size_t i = 0; i < sizeof rates / sizeof *rates; i++)
                if (rates[i].number == number)
                        return &rates[i];
        return &none;
}

VERB int ibv_rate_to_mult(enum ibv_rate rate)
{
        return of_number((int)rate)->multiple;
}

VERB int ibv_rate_to_mbps(enum ibv_rate rate)
{
        return of_number((int)rate)->mbps;
}

VERB enum ibv_rate mult_to_ibv_rate(int multiple)
{
        for (size_t i = 0; multiple > 0 && i < sizeof rates / sizeof *rates; i++)
                if (rates[i].multiple == multiple)
                        return (enum ibv_rate)rates[i].number;
        return IBV_RATE_MAX;
}

VERB enum ibv_rate mbps_to_ibv_rate(int mbps)
{
        for (size_t i = 0; i < sizeof rates / sizeof *rates; i++)
                if (rates[i].mbps == mbps)
                        return (enum ibv_rate)rates[i].number;
        return IBV_RATE_MAX;
}
