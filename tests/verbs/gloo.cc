/* Sums vectors of all sizes over gloo's ibverbs transport, what PyTorch's jobs use: each sum is
 * checked.
 *
 *      gloo FOLDER RANK SIZE
 *
 * The processes find each other by files in FOLDER.
 */
#include <gloo/allreduce_halving_doubling.h>
#include <gloo/allreduce_ring_chunked.h>
#include <gloo/barrier_all_to_all.h>
#include <gloo/broadcast_one_to_all.h>
#include <gloo/rendezvous/context.h>
#include <gloo/rendezvous/file_store.h>
#include <gloo/transport/ibverbs/device.h>

#include <cstdio>
#include <cstdlib>
#include <unistd.h>

using Values = std::vector<float>;

static void fail(const char *what, size_t count)
{
        std::fprintf(stderr, "%s of %zu values is wrong\n", what, count);
        std::exit(1);
}

/* A number that a float has exactly, and sums of some of them, too. */
static float value(int rank, size_t i)
{
        return static_cast<float>((i * 7 + static_cast<size_t>(rank) * 13) % 1009);
}

static Values values(int rank, size_t count)
{
        Values made(count);

        for (size_t i = 0; i < count; i++)
                made[i] = value(rank, i);
        return made;
}

static void check_sum(const char *what, const Values &found, int size)
{
        for (size_t i = 0; i < found.size(); i++) {
                float sum = 0;

                for (int rank = 0; rank < size; rank++)
                        sum += value(rank, i);
                if (found[i] != sum)
                        fail(what, found.size());
        }
}

/* It must outlive what it sends, and gloo doesn't say when that has ended. */
static void run(gloo::Algorithm *algorithm)
{
        algorithm->run();
}

int main(int count, char **arguments)
{
        if (count != 4)
                return 2;
        int rank = std::atoi(arguments[2]), size = std::atoi(arguments[3]);
        gloo::rendezvous::FileStore store(arguments[1]);
        auto device = gloo::transport::ibverbs::CreateDevice({"freeflow0", 1, 0});
        auto context = std::make_shared<gloo::rendezvous::Context>(rank, size);

        context->connectFullMesh(store, device);
        std::vector<Values> kept;
        for (size_t length : {1UL, 100UL, 4096UL, 1000003UL}) {
                int elements = static_cast<int>(length);
                Values summed = values(rank, length), halved = summed, sent = values(rank, length);

                run(new gloo::AllreduceRingChunked<float>(context, {summed.data()}, elements));
                check_sum("a sum by a ring", summed, size);
                run(new gloo::AllreduceHalvingDoubling<float>(context, {halved.data()}, elements));
                check_sum("a sum by halves", halved, size);
                run(new gloo::BroadcastOneToAll<float>(context, {sent.data()}, elements));
                if (sent != values(0, length))
                        fail("a broadcast", length);
                run(new gloo::BarrierAllToAll(context));
                /* The others may still read it. */
                kept.insert(kept.end(), {std::move(summed), std::move(halved), std::move(sent)});
        }
        /* Everybody has everything. */
        store.set("done" + std::to_string(rank), {'1'});
        for (int other = 0; other < size; other++)
                store.get("done" + std::to_string(other));
        std::puts("done");
        std::fflush(stdout);
        _exit(0);
}
