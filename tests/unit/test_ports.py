import socket

from service.ports import bound_socket


def test_answers_on_kept_connections_do_not_wait_for_delayed_acknowledgements() -> None:
    """Head and body of an answer are two writes: with Nagle's algorithm the second one waits 40 ms."""
    with bound_socket("127.0.0.1", 0, "HTTP", "SAM_HTTP_PORT", reuse_port=True) as listening:
        listening.listen()
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
