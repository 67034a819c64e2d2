//go:build ignore

// Services at connect(): docs/design/connect.md.
//
// The programs run when a process of the node connects a socket or sends by one, before there is a packet. They put an
// endpoint's address in the place of a Service's, and the Service's in its place again where the process asks with
// whom it talks.
// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
#include "../kernel.h"

// An address; an IPv4 one is ::ffff:a.b.c.d.
struct address {
	__be32 word[4];
};

struct endpoint {
	struct address address;
	__be16 port;
	__u16 unused;
};

// services are the frontends: what an address and port of a Service stands for. A set of endpoints never changes: when
// the endpoints do, the frontend gets another set in one write, and the old one is deleted after that.
//
// Memory of maps without preallocation follows use, but for 16 bytes for each entry that there may be: 50,000 Services
// of two ports, and of all endpoints twice 50,000 x 5, as all sets may be replaced at once.
struct frontend {
	struct address address; // 127.0.0.1 stands for all of 127.0.0.0/8
	__be16 port;
	__u8 protocol;
	__u8 unused;
};
struct service {
	__u32 set;
	__u32 count; // of the set's endpoints; none is a refusal
	__u32 id;
	__u32 affinity; // seconds; 0 is none
	__u32 pods_only; // whether sockets of the node's own network namespace do not meet it
};
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, struct frontend);
	__type(value, struct service);
} fathom_services SEC(".maps");

// backends are the endpoints of each set, sorted.
struct slot {
	__u32 set;
	__u32 number;
};
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 524288);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, struct slot);
	__type(value, struct endpoint);
} fathom_backends SEC(".maps");

// affinity is which endpoint a client has had last of a Service. A client is a network namespace: a pod, or the node.
struct client {
	__u64 netns;
	__u32 service;
	__u32 v6;
};
struct favourite {
	__u64 used; // when it last connected, in nanoseconds since the node started
	struct endpoint with;
	__u32 unused;
};
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384); // memory is taken for all at once
	__uint(pinning, PIN_BY_NAME);
	__type(key, struct client);
	__type(value, struct favourite);
} fathom_affinity SEC(".maps");

// peers are the sockets that are connected to an endpoint in a Service's place, by their cookies. A socket that closes
// takes its entry away: where the oldest gave way instead, many short connections would push out those that live long.
struct peer {
	struct endpoint to;
	struct frontend as;
};
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, __u64);
	__type(value, struct peer);
} fathom_peers SEC(".maps");

// clients are how many of them a network namespace has. Namespaces that are gone have none, and give way.
enum { PEERS_OF_ONE = 16384 }; // an eighth; Go knows it as ClientShare
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__uint(pinning, PIN_BY_NAME);
	__type(key, __u64);
	__type(value, __s64);
} fathom_clients SEC(".maps");

// talks are which endpoint a UDP socket that is not connected was given for each of its frontends, and out of which set.
// They are a part of the socket: no socket's push out another's, and they go with it.
enum { TALKS = 16 };
struct talk {
	struct frontend as;
	struct endpoint with;
	__u32 set;
	__u64 sent; // the socket's counter when it was used after another; 0 is a place that is free, as all behind it
};
struct talks {
	struct bpf_spin_lock lock; // threads may send by one socket at once
	__u64 sent;
	struct talk talk[TALKS];
};
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, int);
	__type(value, struct talks);
} fathom_talks SEC(".maps");

// node is what there is one of: the node's own network namespace, where alone node ports answer at loopback addresses;
// and the number that the agent has given to a set last. It gives none twice: fathom_talks knows sets that are gone.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__uint(pinning, PIN_BY_NAME);
	__type(key, __u32);
	__type(value, __u64);
} fathom_node SEC(".maps");

// given is what a socket was given: an endpoint, and out of which set; 0 is none, and nothing was given.
struct given {
	struct endpoint to;
	__u32 set;
};

// What became of a socket's wish to talk to a Service. Go's names of them are in pin/connect.go.
enum fate {
	NOT_OURS,
	CONNECTED,
	SENT,     // a packet of a UDP socket that is not connected
	REFUSED,  // no endpoints
	CHANGING, // twice in a row the Service changed at that moment: left to who balances packets
	FULL,     // no room to note what it is connected to: left to who balances packets
	SHARE,    // its client has used up its share of the room: left to who balances packets
	TALKING,  // it has sent to as many Services as a socket may: left to who balances packets
	KERNEL,   // a socket of the kernel's own, as below one of MPTCP: left to who balances packets
	FATES,
};
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, FATES);
	__uint(pinning, PIN_BY_NAME);
	__type(key, __u32);
	__type(value, __u64);
} fathom_connects SEC(".maps");

enum { REFUSE = 0, GO_ON = 1 };

static inline int counted(__u32 what, int verdict)
{
	__u64 *n = bpf_map_lookup_elem(&fathom_connects, &what);
	if (n)
		*n += 1; // each CPU has its own; a program that another one interrupts may cost a count
	return verdict;
}

static inline int refuse(void)
{
	bpf_set_retval(-ECONNREFUSED); // Linux 5.18; the loader takes it out before that, and the process sees EPERM
	return counted(REFUSED, REFUSE);
}

static inline bool is_loopback(const struct address *a)
{
	return !(a->word[0] | a->word[1]) && ((!a->word[2] && a->word[3] == htonl(1)) ||
		(a->word[2] == htonl(0xffff) && (a->word[3] & htonl(0xff000000)) == htonl(0x7f000000)));
}

static inline bool same_address(const struct address *a, const struct address *b)
{
	return ((a->word[0] ^ b->word[0]) | (a->word[1] ^ b->word[1]) | (a->word[2] ^ b->word[2]) | (a->word[3] ^ b->word[3])) == 0;
}

static inline __u64 half(const struct address *a, int i)
{
	return (__u64)htonl(a->word[2 * i]) << 32 | htonl(a->word[2 * i + 1]);
}

// borrow is what subtracting b leaves to the next digit, of 64 bits.
static inline __u64 borrow(__u64 a, __u64 b, __u64 before)
{
	return ((~a & b) | (~(a ^ b) & (a - b - before))) >> 63;
}

// is_before compares without branches: the verifier would go along all of them, in each step of each search.
static inline bool is_before(const struct endpoint *a, const struct endpoint *b)
{
	__u64 n = borrow(htons(a->port), htons(b->port), 0);
	n = borrow(half(&a->address, 1), half(&b->address, 1), n);
	return borrow(half(&a->address, 0), half(&b->address, 0), n);
}

static inline bool endpoint_of(__u32 set, __u32 number, struct endpoint *to)
{
	struct slot key = {set, number};
	struct endpoint *e = bpf_map_lookup_elem(&fathom_backends, &key);
	if (!e)
		return false;
	*to = *e;
	return true;
}

// find looks for an endpoint in a set; near takes another one at the same address where there is none of just this port.
// 16 steps are enough for 65,535 endpoints; of more, it finds some. It is inline, as all is: in a program with functions
// verifiers before Linux 6.3 hold every number for one that matters, and give up on the loop.
static inline bool find(const struct service *s, const struct endpoint *want, bool near, struct endpoint *to)
{
	__u32 low = 0, count = s->count;
	for (int i = 0; i < 16; i++) {
		__u32 half = count / 2;
		if (!count)
			break;
		if (!endpoint_of(s->set, low + half, to))
			return false;
		// What is left are those above the middle, or those below it: without a branch, see is_before.
		__u32 upper = -(__u32)is_before(to, want);
		low += (half + 1) & upper;
		count = half - (((count + 1) & 1) & upper);
	}
	if (endpoint_of(s->set, low, to) && same_address(&to->address, &want->address) && (near || to->port == want->port))
		return true;
	return near && low && endpoint_of(s->set, low - 1, to) && same_address(&to->address, &want->address);
}

static inline struct favourite *favourite_of(struct bpf_sock_addr *ctx, bool v6, const struct service *s)
{
	struct client who = {bpf_get_netns_cookie(ctx), s->id, v6};
	struct favourite *f = bpf_map_lookup_elem(&fathom_affinity, &who);
	return f && bpf_ktime_get_ns() - f->used < s->affinity * 1000000000ull ? f : 0;
}

// pick takes the client's favourite, or what the socket was given before, or any endpoint. Of a Service with affinity the client's
// counts, as all its sockets are to meet one endpoint. There is one search for both: to the verifier it is the most of a program.
static inline bool pick(struct bpf_sock_addr *ctx, bool v6, const struct service *s, const struct given *before, struct endpoint *to)
{
	struct endpoint want = before->to;
	bool wanted = before->set;
	if (s->affinity) {
		struct favourite *f = favourite_of(ctx, v6, s);
		wanted = f;
		if (f)
			want = f->with;
	}
	if (wanted && find(s, &want, s->affinity, to))
		return true;
	return endpoint_of(s->set, bpf_get_prandom_u32() % s->count, to);
}

static inline void remember(struct bpf_sock_addr *ctx, bool v6, const struct service *s, const struct endpoint *to)
{
	if (!s->affinity)
		return;
	struct favourite *f = favourite_of(ctx, v6, s);
	if (f && same_address(&f->with.address, &to->address)) { // the port may be that of another of the Service's ports
		f->used = bpf_ktime_get_ns();
		return;
	}
	struct client who = {bpf_get_netns_cookie(ctx), s->id, v6};
	struct favourite now = {bpf_ktime_get_ns(), *to, 0};
	bpf_map_update_elem(&fathom_affinity, &who, &now, 0);
}

// node_netns is the cookie of the node's own network namespace; 0 if it is not known, before Linux 5.14.
static inline __u64 node_netns(void)
{
	__u32 zero = 0;
	__u64 *node = bpf_map_lookup_elem(&fathom_node, &zero);
	return node ? *node : 0;
}

// meets says whether a socket meets a frontend. Where the node's namespace is not known, those that are for pods alone
// are left to who balances packets, who can tell.
static inline bool meets(struct bpf_sock_addr *ctx, const struct service *s)
{
	if (!s->pods_only)
		return true;
	__u64 node = node_netns();
	return node && node != bpf_get_netns_cookie(ctx);
}

// choose finds an endpoint for a frontend: the one that was given before, if it is still there.
//
// What a lookup returns may become another entry's while it is read: the kernel uses memory of hash maps again at once.
// So all is copied, and holds if the frontend is the same after that: its set was not deleted then.
static inline enum fate choose(struct bpf_sock_addr *ctx, bool v6, const struct frontend *f, const struct given *before,
	struct service *s, struct endpoint *to)
{
	for (int i = 0; i < 2; i++) {
		struct service *now = bpf_map_lookup_elem(&fathom_services, f);
		if (!now)
			return NOT_OURS;
		*s = *now;
		if (!meets(ctx, s))
			return NOT_OURS;
		if (s->count && before->set == s->set) {
			*to = before->to;
			return CONNECTED;
		}
		if (s->count && !pick(ctx, v6, s, before, to))
			continue;
		now = bpf_map_lookup_elem(&fathom_services, f);
		if (now && now->set == s->set && now->count == s->count && now->id == s->id && now->affinity == s->affinity && now->pods_only == s->pods_only) {
			if (!s->count)
				return REFUSED;
			remember(ctx, v6, s, to);
			return CONNECTED;
		}
	}
	return CHANGING;
}

static inline void read_address(struct bpf_sock_addr *ctx, bool v6, struct address *a)
{
	if (v6) {
		a->word[0] = ctx->user_ip6[0];
		a->word[1] = ctx->user_ip6[1];
		a->word[2] = ctx->user_ip6[2];
		a->word[3] = ctx->user_ip6[3];
	} else {
		a->word[0] = 0;
		a->word[1] = 0;
		a->word[2] = htonl(0xffff);
		a->word[3] = ctx->user_ip4;
	}
}

static inline void write(struct bpf_sock_addr *ctx, bool v6, const struct address *a, __be16 port)
{
	if (v6) {
		ctx->user_ip6[0] = a->word[0];
		ctx->user_ip6[1] = a->word[1];
		ctx->user_ip6[2] = a->word[2];
		ctx->user_ip6[3] = a->word[3];
	} else {
		ctx->user_ip4 = a->word[3];
	}
	ctx->user_port = port;
}

static inline bool is_mapped(const struct address *a)
{
	return !(a->word[0] | a->word[1]) && a->word[2] == htonl(0xffff);
}

// read reads where a process wants to go, and by what that is met. All zeros are the machine itself, as for the kernel.
static inline bool read(struct bpf_sock_addr *ctx, bool v6, struct frontend *dialed, struct frontend *by)
{
	if (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP)
		return false;
	read_address(ctx, v6, &dialed->address);
	dialed->port = ctx->user_port;
	dialed->protocol = ctx->protocol;
	dialed->unused = 0;
	if (!dialed->address.word[3] && !(dialed->address.word[0] | dialed->address.word[1])) {
		if (!dialed->address.word[2])
			dialed->address.word[3] = htonl(1);
		else if (is_mapped(&dialed->address))
			dialed->address.word[3] = htonl(0x7f000001);
	}
	*by = *dialed;
	if (is_loopback(&by->address)) {
		__u64 node = node_netns();
		if (!node || node != bpf_get_netns_cookie(ctx))
			return false; // a pod's loopback is its own
		if (is_mapped(&by->address))
			by->address.word[3] = htonl(0x7f000001);
	}
	return true;
}

// is_kernels says whether a socket is one that the kernel made for itself: of NFS, or the one below a socket of MPTCP. The
// kernel runs no program when these close, and asks for another socket's peer, if for any.
static inline bool is_kernels(struct bpf_sock_addr *ctx)
{
	struct sock *sk = bpf_skc_to_tcp_sock(ctx->sk); // where types are not known, the loader has it be none
	if (!sk)
		return false;
	const __u8 *bits = (void *)sk + __builtin_preserve_field_info(sk->sk_kern_sock, BPF_FIELD_BYTE_OFFSET);
	return (__u64)*bits << __builtin_preserve_field_info(sk->sk_kern_sock, BPF_FIELD_LSHIFT_U64) >> 63;
}

// note notes what a socket is connected to, unless its client has used up its share, or all have.
static inline enum fate note(struct bpf_sock_addr *ctx, const struct peer *peer)
{
	__u64 cookie = bpf_get_socket_cookie(ctx), netns = bpf_get_netns_cookie(ctx);
	__s64 none = 0, *sockets = bpf_map_lookup_elem(&fathom_clients, &netns);
	if (!sockets) {
		bpf_map_update_elem(&fathom_clients, &netns, &none, BPF_NOEXIST);
		sockets = bpf_map_lookup_elem(&fathom_clients, &netns);
	}
	if (!sockets)
		return FULL;
	if (*sockets >= PEERS_OF_ONE)
		return SHARE;
	long err = bpf_map_update_elem(&fathom_peers, &cookie, peer, BPF_NOEXIST);
	if (err == -EEXIST) // it connects anew
		return bpf_map_update_elem(&fathom_peers, &cookie, peer, BPF_ANY) ? FULL : CONNECTED;
	if (err)
		return FULL;
	__sync_fetch_and_add(sockets, 1);
	return CONNECTED;
}

enum { DNS_PORT = 53 }; // Go knows it as service.DNSPort

// is_lasting says whether a socket may be wanted for longer than its endpoint: one of UDP. The kernel asks no program where
// to a connected one sends, and nothing moves it to another endpoint. Resolvers of names take a new one for each question.
static inline bool is_lasting(const struct frontend *by)
{
	return by->protocol == IPPROTO_UDP && by->port != htons(DNS_PORT);
}

static inline int connect(struct bpf_sock_addr *ctx, bool v6)
{
	struct frontend dialed, by;
	struct service s = {};
	struct endpoint to = {};
	const struct given none = {};
	if (!read(ctx, v6, &dialed, &by))
		return GO_ON;
	if (is_lasting(&by) && !is_loopback(&by.address)) // of a loopback address the node's own comes in its place
		return GO_ON; // who balances packets moves it
	switch (choose(ctx, v6 && !is_mapped(&by.address), &by, &none, &s, &to)) {
	case NOT_OURS:
		return GO_ON;
	case REFUSED:
		return refuse();
	case CHANGING:
		return counted(CHANGING, GO_ON);
	default:
		break;
	}
	struct peer peer = {to, dialed};
	enum fate fate = is_kernels(ctx) ? KERNEL : note(ctx, &peer);
	if (fate == CONNECTED || is_loopback(&by.address)) // packets to loopback addresses are not balanced where sockets are
		write(ctx, v6, &to.address, to.port);
	return counted(fate, GO_ON);
}

// recall finds what a socket was given for a frontend, and how often it has sent to others since. It is not ok if there is nothing
// and no room. A free place, which is all zeros, is read as any other: the verifier would go along both ways to the end.
static inline bool recall(struct talks *all, const struct frontend *as, struct given *before, __u64 *since)
{
	bool ok = false;
	bpf_spin_lock(&all->lock);
	for (int i = 0; i < TALKS; i++) {
		struct talk *t = &all->talk[i];
		if (t->sent && (t->as.port != as->port || !same_address(&t->as.address, &as->address)))
			continue;
		before->to = t->with;
		before->set = t->set;
		*since = all->sent - t->sent;
		ok = true;
		break;
	}
	bpf_spin_unlock(&all->lock);
	return ok;
}

// record keeps what a socket was given, unless there is no room. No frontend gives way to another: its answers would be
// shown as the endpoint's.
static inline bool record(struct talks *all, const struct frontend *as, const struct given *now)
{
	bool done = false;
	bpf_spin_lock(&all->lock);
	for (int i = 0; i < TALKS; i++) {
		struct talk *t = &all->talk[i];
		if (t->sent && (t->as.port != as->port || !same_address(&t->as.address, &as->address)))
			continue;
		t->as = *as;
		t->with = now->to;
		t->set = now->set;
		t->sent = ++all->sent;
		done = true;
		break;
	}
	bpf_spin_unlock(&all->lock);
	return done;
}

// sendmsg is for UDP sockets that are not connected. One that is comes here too: if a process names an address all the
// same, and, of an IPv6 socket with an IPv4 peer, with every packet. It hears its peer alone, so that it is sent there.
static inline int sendmsg(struct bpf_sock_addr *ctx, bool v6)
{
	struct frontend dialed, by;
	struct service s = {};
	struct endpoint to = {};
	if (!read(ctx, v6, &dialed, &by) || !bpf_map_lookup_elem(&fathom_services, &by))
		return GO_ON;
	if (ctx->sk->state == TCP_ESTABLISHED) {
		__u64 cookie = bpf_get_socket_cookie(ctx);
		struct peer *peer = bpf_map_lookup_elem(&fathom_peers, &cookie);
		if (peer && peer->as.port == dialed.port && same_address(&peer->as.address, &dialed.address))
			write(ctx, v6, &peer->to.address, peer->to.port);
		return GO_ON;
	}
	struct talks *all = bpf_sk_storage_get(&fathom_talks, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!all)
		return counted(TALKING, GO_ON);
	struct given given = {};
	__u64 since = 0;
	if (!recall(all, &dialed, &given, &since))
		return counted(TALKING, GO_ON);
	switch (choose(ctx, v6, &by, &given, &s, &to)) {
	case NOT_OURS:
		return GO_ON;
	case REFUSED:
		return refuse();
	case CHANGING:
		return counted(CHANGING, GO_ON);
	default:
		break;
	}
	if (since || given.set != s.set) {
		given.to = to;
		given.set = s.set;
		if (!record(all, &dialed, &given))
			return counted(TALKING, GO_ON);
	}
	write(ctx, v6, &to.address, to.port);
	return counted(SENT, GO_ON);
}

static inline int getpeername(struct bpf_sock_addr *ctx, bool v6)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct address to;
	read_address(ctx, v6, &to);
	struct peer *peer = bpf_map_lookup_elem(&fathom_peers, &cookie);
	// The socket may have connected to another address since.
	if (peer && peer->to.port == (__be16)ctx->user_port && same_address(&peer->to.address, &to))
		write(ctx, v6, &peer->as.address, peer->as.port);
	return GO_ON;
}

// recvmsg shows an answer as from the frontend that the socket has sent to; of several, the last.
static inline int recvmsg(struct bpf_sock_addr *ctx, bool v6)
{
	if (ctx->sk->state == TCP_ESTABLISHED)
		return getpeername(ctx, v6);
	struct talks *all = bpf_sk_storage_get(&fathom_talks, ctx->sk, 0, 0);
	if (!all)
		return GO_ON;
	struct address from;
	read_address(ctx, v6, &from);
	__be16 port = ctx->user_port;
	struct frontend as = {};
	__u64 sent = 0;
	bpf_spin_lock(&all->lock);
	for (int i = 0; i < TALKS && all->talk[i].sent; i++) {
		struct talk *t = &all->talk[i];
		if (t->sent < sent || t->with.port != port || !same_address(&t->with.address, &from))
			continue;
		sent = t->sent;
		as = t->as;
	}
	bpf_spin_unlock(&all->lock);
	if (sent)
		write(ctx, v6, &as.address, as.port);
	return GO_ON;
}

SEC("cgroup/connect4") int fathom_connect4(struct bpf_sock_addr *ctx) { return connect(ctx, false); }
SEC("cgroup/connect6") int fathom_connect6(struct bpf_sock_addr *ctx) { return connect(ctx, true); }
// A packet to ::ffff:a.b.c.d comes by sendmsg4, and its answer by recvmsg6.
SEC("cgroup/sendmsg4") int fathom_sendmsg4(struct bpf_sock_addr *ctx) { return sendmsg(ctx, false); }
SEC("cgroup/sendmsg6") int fathom_sendmsg6(struct bpf_sock_addr *ctx) { return sendmsg(ctx, true); }
SEC("cgroup/recvmsg4") int fathom_recvmsg4(struct bpf_sock_addr *ctx) { return recvmsg(ctx, false); }
SEC("cgroup/recvmsg6") int fathom_recvmsg6(struct bpf_sock_addr *ctx) { return recvmsg(ctx, true); }
SEC("cgroup/getpeername4") int fathom_getpeer4(struct bpf_sock_addr *ctx) { return getpeername(ctx, false); }
SEC("cgroup/getpeername6") int fathom_getpeer6(struct bpf_sock_addr *ctx) { return getpeername(ctx, true); }

SEC("cgroup/sock_release")
int fathom_release(struct bpf_sock *ctx)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	if (bpf_map_delete_elem(&fathom_peers, &cookie))
		return GO_ON;
	__u64 netns = bpf_get_netns_cookie(ctx);
	__s64 *sockets = bpf_map_lookup_elem(&fathom_clients, &netns);
	if (sockets && *sockets > 0) // the socket may be older than the count
		__sync_fetch_and_add(sockets, -1);
	return GO_ON;
}

char fathom_license[] SEC("license") = "GPL"; // the kernel lets no other call its functions
