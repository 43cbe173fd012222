/* Asio's event loop with four threads in it, at both ends: server|client ADDRESS PORT. Each client sends a
 * stream and compares the echo.
 */
#include <asio.hpp>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

using asio::ip::tcp;
using error = asio::error_code;

enum { THREADS = 4, CONNECTIONS = 16, TURNS = 200, TOTAL = 3000000 };

static void check(bool right, const char *what)
{
        if (right)
                return;
        std::fprintf(stderr, "%s\n", what);
        std::_Exit(1);
}

static uint8_t byte_at(unsigned number, size_t place)
{
        return static_cast<uint8_t>(((place + number * 77) * UINT64_C(0x9e3779b97f4a7c15)) >> 56);
}

/* Sends back what it receives. */
struct Echo : std::enable_shared_from_this<Echo> {
        explicit Echo(tcp::socket taken) : socket(std::move(taken)), buffer(20000)
        {
        }
        void read()
        {
                auto self = shared_from_this();
                socket.async_read_some(asio::buffer(buffer), [self](error failed, size_t got) {
                        error ignored;

                        if (failed)
                                self->socket.shutdown(tcp::socket::shutdown_send, ignored);
                        else
                                self->write(got);
                });
        }
        void write(size_t size)
        {
                auto self = shared_from_this();
                asio::async_write(socket, asio::buffer(buffer, size), [self](error failed, size_t) {
                        if (!failed)
                                self->read();
                });
        }
        tcp::socket socket;
        std::vector<uint8_t> buffer;
};

/* First ping-pong, while the connection moves; then both directions at once. */
struct Call : std::enable_shared_from_this<Call> {
        Call(asio::io_context &context, unsigned which)
            : socket(context), number(which), out(90000), in(50000)
        {
        }
        void turn()
        {
                auto self = shared_from_this();

                if (turns++ == TURNS) {
                        send();
                        receive();
                        return;
                }
                asio::async_write(socket, asio::buffer(out, 100), [self](error failed, size_t) {
                        check(!failed, "write");
                        asio::async_read(self->socket, asio::buffer(self->in, 100),
                                         [self](error late, size_t) {
                                                 check(!late, "read");
                                                 self->turn();
                                         });
                });
        }
        void send()
        {
                auto self = shared_from_this();
                error ignored;

                if (sent == TOTAL) {
                        socket.shutdown(tcp::socket::shutdown_send, ignored);
                        return;
                }
                size = (size * 7 + 13) % 89999 + 1;
                if (size > TOTAL - sent)
                        size = TOTAL - sent;
                for (size_t i = 0; i < size; i++)
                        out[i] = byte_at(number, sent + i);
                asio::async_write(socket, asio::buffer(out, size), [self](error failed, size_t moved) {
                        check(!failed, "write of the stream");
                        self->sent += moved;
                        self->send();
                });
        }
        void receive()
        {
                auto self = shared_from_this();
                socket.async_read_some(asio::buffer(in), [self](error failed, size_t got) {
                        if (failed) {
                                check(failed == asio::error::eof && self->received == TOTAL, "the end");
                                return;
                        }
                        for (size_t i = 0; i < got; i++)
                                check(self->in[i] == byte_at(self->number, self->received + i), "a byte");
                        self->received += got;
                        self->receive();
                });
        }
        tcp::socket socket;
        unsigned number;
        int turns = 0;
        size_t sent = 0, received = 0, size = 1;
        std::vector<uint8_t> out, in;
};

static void accept_next(tcp::acceptor &acceptor)
{
        acceptor.async_accept([&acceptor](error failed, tcp::socket socket) {
                if (!failed)
                        std::make_shared<Echo>(std::move(socket))->read();
                accept_next(acceptor);
        });
}

int main(int, char **arguments)
{
        asio::io_context context;
        tcp::endpoint address(asio::ip::make_address(arguments[2]),
                              static_cast<uint16_t>(std::atoi(arguments[3])));
        std::unique_ptr<tcp::acceptor> acceptor;
        std::vector<std::thread> threads;

        if (arguments[1][0] == 's') {
                acceptor = std::make_unique<tcp::acceptor>(context, address);
                accept_next(*acceptor);
        }
        for (unsigned i = 0; !acceptor && i < CONNECTIONS; i++) {
                auto call = std::make_shared<Call>(context, i);

                call->socket.async_connect(address, [call](error failed) {
                        check(!failed, "connect");
                        call->turn();
                });
        }
        for (int i = 0; i < THREADS; i++)
                threads.emplace_back([&context] { context.run(); });
        for (std::thread &each : threads)
                each.join();
        return 0;
}
