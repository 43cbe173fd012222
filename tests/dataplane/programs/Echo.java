import java.io.DataInputStream;
import java.net.InetSocketAddress;
import java.net.Socket;
import java.nio.ByteBuffer;
import java.nio.channels.SelectionKey;
import java.nio.channels.Selector;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.util.Arrays;
import java.util.Random;

/** A server on NIO's selector and clients on blocking sockets: server|client ADDRESS PORT. */
public class Echo {
    static void serve(InetSocketAddress address) throws Exception {
        Selector selector = Selector.open();
        ServerSocketChannel listener = ServerSocketChannel.open().bind(address, 100);
        listener.configureBlocking(false);
        listener.register(selector, SelectionKey.OP_ACCEPT);
        while (true) {
            selector.select();
            for (SelectionKey key : selector.selectedKeys()) {
                if (key.isAcceptable()) {
                    SocketChannel channel = listener.accept();
                    channel.configureBlocking(false);
                    channel.register(selector, SelectionKey.OP_READ, ByteBuffer.allocateDirect(30000));
                    continue;
                }
                SocketChannel channel = (SocketChannel) key.channel();
                ByteBuffer buffer = (ByteBuffer) key.attachment();
                if (key.isReadable() && channel.read(buffer) < 0) {
                    channel.close();
                    continue;
                }
                buffer.flip();
                channel.write(buffer);
                boolean full = buffer.hasRemaining();
                buffer.compact();
                key.interestOps(full ? SelectionKey.OP_WRITE : SelectionKey.OP_READ);
            }
            selector.selectedKeys().clear();
        }
    }

    static void call(InetSocketAddress address, int number) throws Exception {
        Random chance = new Random(number);
        int[] sizes = {1, 500, 9000, 60000};
        try (Socket socket = new Socket(address.getAddress(), address.getPort())) {
            DataInputStream in = new DataInputStream(socket.getInputStream());
            for (int i = 0; i < 200; i++) {
                byte[] sent = new byte[sizes[i % 4]], got = new byte[sent.length];
                chance.nextBytes(sent);
                socket.getOutputStream().write(sent);
                in.readFully(got);
                if (!Arrays.equals(sent, got)) System.exit(1);
            }
            socket.shutdownOutput();
            if (in.read() != -1) System.exit(1);
        }
    }

    public static void main(String[] arguments) throws Exception {
        InetSocketAddress address = new InetSocketAddress(arguments[1], Integer.parseInt(arguments[2]));
        if (arguments[0].equals("server")) serve(address);
        Thread[] threads = new Thread[8];
        for (int i = 0; i < threads.length; i++) {
            int number = i;
            threads[i] = new Thread(() -> {
                try {
                    call(address, number);
                } catch (Throwable error) {
                    error.printStackTrace();
                    System.exit(1);
                }
            });
            threads[i].start();
        }
        for (Thread each : threads) each.join();
    }
}
