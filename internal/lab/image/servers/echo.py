"""What echo servers of courses answer, by the name that this program is called with.

whoami       port 80    who answered, and the request, as traefik/whoami
echoserver   port 8080  who answered, and the request, as registry.k8s.io/echoserver and kicbase/echo-server
"""
import argparse
import os
import signal
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

name = os.path.basename(sys.argv[0])


def addresses():
    """The addresses of this pod, the loopback device's first, as the kernel lists them."""
    found = []
    for line in os.popen("ip -o addr").read().splitlines():
        found.append(line.split()[3].split("/")[0])
    return found


def request_lines(r):
    return [f"{r.command} {r.path} {r.request_version}"] + [f"{k}: {v}" for k, v in r.headers.items()]


def whoami(r, options):
    lines = [f"Name: {options.name}"] if options.name else []
    lines += [f"Hostname: {socket.gethostname()}"] + [f"IP: {a}" for a in addresses()]
    lines += [f"RemoteAddr: {host_port(r.client_address)}"] + request_lines(r)
    return "\n".join(lines) + "\n"


def echoserver(r, options):
    lines = [f"Request served by {socket.gethostname()}", "", f"Hostname: {socket.gethostname()}", f"client_address={plain(r.client_address[0])}", ""]
    return "\n".join(lines + request_lines(r)) + "\n"


def plain(address):
    return address.removeprefix("::ffff:")


def host_port(client):
    address = plain(client[0])
    return f"[{address}]:{client[1]}" if ":" in address else f"{address}:{client[1]}"


parser = argparse.ArgumentParser(prog=name, allow_abbrev=False)
default = os.environ.get("WHOAMI_PORT_NUMBER", "80") if name == "whoami" else os.environ.get("PORT", "8080")
parser.add_argument("-port", "--port", type=int, default=int(default))
parser.add_argument("-name", "--name", default=os.environ.get("WHOAMI_NAME", ""))
options = parser.parse_args()
answer = whoami if name == "whoami" else echoserver


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "fathom-" + name, ""

    def respond(self):
        left = int(self.headers.get("Content-Length") or 0)
        while left > 0:
            data = self.rfile.read(min(left, 1 << 16))
            if not data:
                return
            left -= len(data)
        body = answer(self, options).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = respond

    def log_message(self, form, *args):
        print(f"{plain(self.client_address[0])} [{self.log_date_time_string()}] {form % args}", flush=True)


class Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True
    request_queue_size = 128

    def server_bind(self):
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


# The first process of a pod ends by no signal that it does not ask for.
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
signal.signal(signal.SIGINT, lambda *_: os._exit(0))
print(f"{name}: listening at port {options.port}", flush=True)
Server(("::", options.port), Handler).serve_forever()
