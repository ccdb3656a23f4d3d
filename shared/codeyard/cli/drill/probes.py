"""Does a server answer, now, as a client would find it? One try, no waiting beyond a second."""

import socket

import pika
import pika.exceptions


def redis_answers(host: str, port: int) -> bool:
    """It answers PING, and not with LOADING."""
    try:
        with socket.create_connection((host, port), timeout=1) as link:
            link.sendall(b"PING\r\n")
            return link.recv(64).startswith(b"+PONG")
    except OSError:
        return False


def amqp_answers(url: str) -> bool:
    """A client can log in and open a channel."""
    parameters = pika.URLParameters(url)
    parameters.socket_timeout = parameters.stack_timeout = parameters.blocked_connection_timeout = 5
    try:
        connection = pika.BlockingConnection(parameters)
        connection.channel()
        connection.close()
    except (pika.exceptions.AMQPError, OSError):
        return False
    return True
