import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.ByteBuffer;
import java.nio.channels.SelectionKey;
import java.nio.channels.Selector;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.util.Queue;
import java.util.concurrent.ConcurrentLinkedQueue;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;

/**
 * Several threads with a selector each, and a pool that reads and writes and changes the selectors'
 * interest, at both ends: server|client ADDRESS PORT. Each client sends a stream and compares the echo.
 */
public class Loops {
    static final int LOOPS = 3, CONNECTIONS = 12, TURNS = 200, TOTAL = 2_000_000;
    static final ExecutorService pool = Executors.newFixedThreadPool(3);
    static final CountDownLatch over = new CountDownLatch(CONNECTIONS);

    static byte at(int number, long place) {
        return (byte) (((place + number * 77L) * 0x9e3779b97f4a7c15L) >>> 56);
    }

    static void fail(Throwable error) {
        error.printStackTrace();
        System.exit(1);
    }

    /** A thread that waits, and passes ready connections to workers. */
    static class Loop extends Thread {
        final Selector selector;
        final Queue<Runnable> asked = new ConcurrentLinkedQueue<>();

        Loop() throws IOException {
            selector = Selector.open();
            setDaemon(true);
            start();
        }

        void ask(Runnable what) {
            asked.add(what);
            selector.wakeup();
        }

        void add(SocketChannel channel, End end) {
            ask(() -> {
                try {
                    channel.configureBlocking(false);
                    end.loop = this;
                    end.key = channel.register(selector, SelectionKey.OP_READ, end);
                    end.begin();
                } catch (IOException error) {
                    fail(error);
                }
            });
        }

        @Override
        public void run() {
            try {
                while (true) {
                    selector.select();
                    for (Runnable what; (what = asked.poll()) != null; ) what.run();
                    for (SelectionKey key : selector.selectedKeys()) {
                        if (!key.isValid()) continue;
                        End end = (End) key.attachment();
                        // As with a one-shot event: no other worker has it until this one has finished.
                        key.interestOps(0);
                        pool.execute(end::move);
                    }
                    selector.selectedKeys().clear();
                }
            } catch (Throwable error) {
                fail(error);
            }
        }
    }

    abstract static class End {
        SelectionKey key;
        Loop loop;

        void begin() throws IOException {}

        /** Reads and writes what is possible. Returns the operations to wait for, 0 at the end. */
        abstract int step(SocketChannel channel) throws IOException;

        void move() {
            try {
                SocketChannel channel = (SocketChannel) key.channel();
                int next = step(channel);
                if (next == 0) {
                    channel.close();
                    return;
                }
                key.interestOps(next);
                loop.selector.wakeup();
            } catch (Throwable error) {
                fail(error);
            }
        }
    }

    static class Echo extends End {
        final ByteBuffer buffer = ByteBuffer.allocateDirect(30000);

        @Override
        int step(SocketChannel channel) throws IOException {
            boolean ended = channel.read(buffer) < 0;
            buffer.flip();
            channel.write(buffer);
            boolean left = buffer.hasRemaining(), full = buffer.limit() == buffer.capacity();
            buffer.compact();
            if (ended && !left) return 0;
            return (left ? SelectionKey.OP_WRITE : 0) | (ended || (left && full) ? 0 : SelectionKey.OP_READ);
        }
    }

    static class Call extends End {
        final int number;
        final ByteBuffer out = ByteBuffer.allocateDirect(40000), in = ByteBuffer.allocateDirect(50000);
        long sent, received, allowed = 100;
        boolean shut;

        Call(int number) {
            this.number = number;
            out.limit(0);
        }

        @Override
        void begin() throws IOException {
            key.interestOps(SelectionKey.OP_READ | SelectionKey.OP_WRITE);
        }

        @Override
        int step(SocketChannel channel) throws IOException {
            // First ping-pong, while the connections move; then all at once.
            allowed = received >= TURNS * 100L ? TOTAL : received + 100;
            while (true) {
                if (!out.hasRemaining() && sent < allowed) {
                    out.clear();
                    while (out.hasRemaining() && sent < allowed) out.put(at(number, sent++));
                    out.flip();
                }
                if (!out.hasRemaining() || channel.write(out) == 0) break;
            }
            if (sent == TOTAL && !out.hasRemaining() && !shut) {
                channel.shutdownOutput();
                shut = true;
            }
            in.clear();
            int got = channel.read(in);
            in.flip();
            while (in.hasRemaining())
                if (in.get() != at(number, received++)) throw new IOException("byte " + (received - 1));
            if (got < 0) {
                if (received != TOTAL) throw new IOException("ended at " + received);
                over.countDown();
                return 0;
            }
            boolean more = out.hasRemaining() || sent < (received >= TURNS * 100L ? TOTAL : received / 100 * 100 + 100);
            return SelectionKey.OP_READ | (more ? SelectionKey.OP_WRITE : 0);
        }
    }

    public static void main(String[] arguments) throws Exception {
        InetSocketAddress address = new InetSocketAddress(arguments[1], Integer.parseInt(arguments[2]));
        Loop[] loops = new Loop[LOOPS];
        for (int i = 0; i < LOOPS; i++) loops[i] = new Loop();
        if (arguments[0].equals("server")) {
            ServerSocketChannel listener = ServerSocketChannel.open().bind(address, 100);
            for (int i = 0; ; i++) loops[i % LOOPS].add(listener.accept(), new Echo());
        }
        for (int i = 0; i < CONNECTIONS; i++) loops[i % LOOPS].add(SocketChannel.open(address), new Call(i));
        over.await();
        System.exit(0);
    }
}
