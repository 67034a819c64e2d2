//go:build ignore

// The fast path of pods' packets: docs/design/fastpath.md.
//
// fathom_pod runs where a packet leaves a pod, on the node's end of its veth pair; fathom_wire where one
// comes in from another node. What either is not certain of it leaves to the kernel's stack, which does the same,
// only slower.
// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
#include "../kernel.h"

// An address; an IPv4 one is ::ffff:a.b.c.d.
struct address {
	__be32 word[4];
};

// pods are the addresses of this node's pods.
struct pod {
	__u32 ifindex; // of the node's end
	__u32 stack;   // why its packets take the stack; 0 if they need not
	__u8 mac[ETH_ALEN];
	__u8 host_mac[ETH_ALEN];
};
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, struct address);
	__type(value, struct pod);
} fathom_pods SEC(".maps");

// ports are the node's ends of pods' veth pairs: what a pod may send that is not from its address.
struct port {
	__u8 mac[ETH_ALEN];
	__u16 unused;
};
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct port);
} fathom_ports SEC(".maps");

// remotes are the ranges of other nodes' pods, and the way there.
struct prefix {
	__u32 length; // an IPv4 prefix's plus 96
	struct address address;
};
struct remote {
	__u32 ifindex;
	struct bpf_redir_neigh via;
};
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, struct prefix);
	__type(value, struct remote);
} fathom_remotes SEC(".maps");

#include "policies.h"

// What becomes of a packet, and why. Go's names of them are in pin/count.go.
enum reason {
	UNDECIDED,
	TO_POD,       // redirected: into a pod of this node
	TO_NODE,      // redirected: to another node
	FROM_NODE,    // redirected: from another node into a pod
	ELSEWHERE,    // stack: not to a pod
	PROTOCOL,     // stack: neither TCP nor UDP, nor an error about them
	FRAGMENT,     // stack
	OPTIONS,      // stack: IP options or extension headers
	TTL,          // stack, which answers
	MTU,          // stack, which answers
	TRACKED,      // stack: its connection tracking knows the connection, and may have changed its addresses
	POD_STACK,    // stack: one of the pods wants it so
	SELF,         // stack: a pod to itself
	NOT_OURS,     // stack: for another MAC address, or of a VLAN
	DROP_MAC,     // dropped: not the pod's MAC address
	DROP_SOURCE,  // dropped: not the pod's address
	DROP_ARP,     // dropped: an ARP packet that speaks for somebody else
	DROP_ETHERTYPE, // dropped: something whose source cannot be checked
	POLICY,       // stack: policies isolate one of the pods, and the maps do not allow it
	NO_FLOW,      // stack: policies isolate one of the pods, and its connection is none that was judged here
	DROP_FORBIDDEN, // dropped: of a connection that policies do not allow any more
	REASONS,
};
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, REASONS);
	__uint(pinning, PIN_BY_NAME);
	__type(key, __u32);
	__type(value, __u64);
} fathom_counts SEC(".maps");

static inline int counted(__u32 why, int verdict)
{
	__u64 *n = bpf_map_lookup_elem(&fathom_counts, &why);
	if (n)
		*n += 1; // each CPU has its own
	return verdict;
}
static inline int pass(enum reason why) { return counted(why, TC_ACT_UNSPEC); }
static inline int drop(enum reason why) { return counted(why, TC_ACT_SHOT); }

// packet is what is read of one.
struct packet {
	struct address src, dst;
	bool v6;
	__u8 protocol;
	__u8 ttl;
	enum reason slow;   // why it is the stack's, whereever it goes
	bool begins;        // it may be the first of a connection
	__u8 flags;         // of TCP
	bool icmp_error;    // whose connection is that of the packet in it
	struct address about_src, about_dst; // the packet in it
	struct bpf_sock_tuple tuple;         // of the connection, as conntrack knows it
	__be16 sport, dport;                 // in it
};

static inline void set4(struct address *a, __be32 v)
{
	a->word[0] = 0;
	a->word[1] = 0;
	a->word[2] = htonl(0xffff);
	a->word[3] = v;
}

static inline void set6(struct address *a, const __be32 *v)
{
	a->word[0] = v[0];
	a->word[1] = v[1];
	a->word[2] = v[2];
	a->word[3] = v[3];
}

static inline bool same_mac(const __u8 *a, const __u8 *b)
{
	return ((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4]) | (a[5] ^ b[5])) == 0;
}

// The compiler must not keep these where it thinks them 32 bits wide, nor across a call that moves them: the verifier
// then sees a number where there was a pointer.
static inline void *start_of(const struct __sk_buff *skb)
{
	void *p;
	asm volatile("%0 = *(u32 *)(%1 + %2)" : "=r"(p) : "r"(skb), "i"(__builtin_offsetof(struct __sk_buff, data)));
	return p;
}
static inline void *end_of(const struct __sk_buff *skb)
{
	void *p;
	asm volatile("%0 = *(u32 *)(%1 + %2)" : "=r"(p) : "r"(skb), "i"(__builtin_offsetof(struct __sk_buff, data_end)));
	return p;
}

// at returns the bytes at an offset, if there are as many, wherever the device has put them.
static inline void *at(struct __sk_buff *skb, __u32 offset, __u32 size)
{
	void *data = start_of(skb), *end = end_of(skb);
	if (unlikely(data + offset + size > end)) {
		if (bpf_skb_pull_data(skb, offset + size))
			return 0;
		data = start_of(skb);
		end = end_of(skb);
		if (data + offset + size > end)
			return 0;
	}
	return data + offset;
}

static inline void set_tuple(struct packet *p, const struct address *src, const struct address *dst, __be16 sport, __be16 dport)
{
	p->sport = sport;
	p->dport = dport;
	if (p->v6) {
		set6((struct address *)p->tuple.ipv6.saddr, src->word);
		set6((struct address *)p->tuple.ipv6.daddr, dst->word);
		p->tuple.ipv6.sport = sport;
		p->tuple.ipv6.dport = dport;
	} else {
		p->tuple.ipv4.saddr = src->word[3];
		p->tuple.ipv4.daddr = dst->word[3];
		p->tuple.ipv4.sport = sport;
		p->tuple.ipv4.dport = dport;
	}
}

// read_about reads the packet that an ICMP error is about. Conntrack knows its connection by the answer's addresses:
// those of the packet itself may have been changed since.
static inline void read_about(struct __sk_buff *skb, struct packet *p, __u32 offset)
{
	p->slow = PROTOCOL;
	__be16 *port;
	if (p->v6) {
		struct ipv6hdr *ip = at(skb, offset, sizeof(*ip));
		if (!ip)
			return;
		set6(&p->about_src, ip->saddr);
		set6(&p->about_dst, ip->daddr);
		p->protocol = ip->nexthdr;
		port = at(skb, offset + sizeof(*ip), 4);
	} else {
		struct iphdr *ip = at(skb, offset, sizeof(*ip));
		if (!ip || ip->version_ihl != 0x45 || ip->frag_off & htons(0x1fff))
			return;
		set4(&p->about_src, ip->saddr);
		set4(&p->about_dst, ip->daddr);
		p->protocol = ip->protocol;
		port = at(skb, offset + sizeof(*ip), 4);
	}
	if (!port || (p->protocol != IPPROTO_TCP && p->protocol != IPPROTO_UDP))
		return;
	set_tuple(p, &p->about_dst, &p->about_src, port[1], port[0]);
	p->icmp_error = true;
	p->slow = UNDECIDED;
}

// read reads a packet. Without an IP header in it there is no source, and it returns false.
static inline bool read(struct __sk_buff *skb, struct packet *p)
{
	__u32 offset;
	p->slow = UNDECIDED;
	p->icmp_error = false;
	p->begins = false;
	p->flags = 0;
	if (skb->protocol == htons(ETH_P_IP)) {
		struct iphdr *ip = at(skb, ETH_HLEN, sizeof(*ip));
		if (!ip)
			return false;
		p->v6 = false;
		set4(&p->src, ip->saddr);
		set4(&p->dst, ip->daddr);
		p->protocol = ip->protocol;
		p->ttl = ip->ttl;
		if (ip->frag_off & htons(0x3fff)) // more fragments, or an offset
			p->slow = FRAGMENT;
		else if (ip->version_ihl != 0x45)
			p->slow = OPTIONS;
		offset = ETH_HLEN + sizeof(*ip);
	} else {
		struct ipv6hdr *ip = at(skb, ETH_HLEN, sizeof(*ip));
		if (!ip)
			return false;
		p->v6 = true;
		set6(&p->src, ip->saddr);
		set6(&p->dst, ip->daddr);
		p->protocol = ip->nexthdr;
		p->ttl = ip->hop_limit;
		switch (p->protocol) {
		case 0:  // hop-by-hop
		case 43: // routing
		case 51: // authentication
		case 60: // destination options
			p->slow = OPTIONS;
			break;
		case 44:
			p->slow = FRAGMENT;
		}
		offset = ETH_HLEN + sizeof(*ip);
	}
	if (p->slow != UNDECIDED)
		return true;
	if (p->protocol == IPPROTO_TCP || p->protocol == IPPROTO_UDP) {
		__be16 *port = at(skb, offset, 4);
		if (!port) {
			p->slow = PROTOCOL;
			return true;
		}
		set_tuple(p, &p->src, &p->dst, port[0], port[1]);
		p->begins = p->protocol == IPPROTO_UDP;
		if (!p->begins) {
			__u8 *flags = at(skb, offset + 13, 1);
			p->flags = flags ? *flags : TCP_SYN;
			p->begins = (p->flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
		}
		return true;
	}
	p->slow = PROTOCOL;
	if (p->protocol == (p->v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP)) {
		__u8 *type = at(skb, offset, 1);
		// Errors: unreachable, time exceeded, bad parameter; of IPv6 too big as well.
		if (type && (p->v6 ? *type >= 1 && *type <= 4 : *type == 3 || *type == 11 || *type == 12))
			read_about(skb, p, offset + 8);
	}
	return true;
}

// is_tracked says whether the node's conntrack knows the connection. Such a one may have been translated, as those to
// Services and host ports are, and conntrack is to see all of a connection or nothing.
static inline bool is_tracked(struct __sk_buff *skb, struct packet *p)
{
	struct bpf_ct_opts opts = {.netns_id = -1, .l4proto = p->protocol};
	struct nf_conn *ct;
	if (!bpf_skb_ct_lookup || !bpf_ct_release)
		return false; // the agent knows, and lets none come here unless it was told that nothing translates
	ct = bpf_skb_ct_lookup(skb, &p->tuple, p->v6 ? sizeof(p->tuple.ipv6) : sizeof(p->tuple.ipv4), &opts, sizeof(opts));
	if (ct) {
		bpf_ct_release(ct);
		return true;
	}
	return opts.error != -ENOENT;
}

// is_known says that of the connection of a packet, and where it may begin one, that its answers may be another's.
static inline bool is_known(struct __sk_buff *skb, struct packet *p)
{
	if (is_tracked(skb, p))
		return true;
	if (!p->begins)
		return false;
	// A connection to a Service may have the same port here and the same pod there: its answers would be taken for
	// this one's. Conntrack gives one of the two another port, if it sees both.
	struct packet answer = {.v6 = p->v6, .protocol = p->protocol};
	set_tuple(&answer, &p->dst, &p->src, p->dport, p->sport);
	return is_tracked(skb, &answer);
}

// key_of names the connection between two ends, the same in both directions, and says whether the first end is the higher one.
static inline bool key_of(struct flow_key *key, const struct address *a, __be16 a_port, const struct address *b, __be16 b_port)
{
	bool higher = a_port > b_port;
	for (int i = 3; i >= 0; i--)
		if (a->word[i] != b->word[i])
			higher = a->word[i] > b->word[i];
	key->low = higher ? *b : *a;
	key->high = higher ? *a : *b;
	key->low_port = higher ? b_port : a_port;
	key->high_port = higher ? a_port : b_port;
	return higher;
}

// judged says what becomes of a packet where policies isolate one of two pods; UNDECIDED is that it may pass. The maps only allow: of what they
// do not, the stack's rules decide. Which of the ends are this node's pods, own_src and own_dst say.
static inline enum reason judged(struct __sk_buff *skb, struct packet *p, bool own_src, bool own_dst)
{
	if (p->protocol != IPPROTO_TCP) // datagrams are answered by fragments, which only the stack can tell to be answers
		return POLICY;
	__u32 zero = 0;
	struct judge *judge = bpf_map_lookup_elem(&fathom_judge, &zero);
	if (!judge || !judge->on)
		return POD_STACK;
	struct flow_key key = {};
	if (p->icmp_error) {
		// Nobody may tell by it what he could not tell otherwise: it goes to who sent the packet, and from a pod it comes from who got it.
		if (!same_address(&p->about_src, &p->dst) || (own_src && !same_address(&p->about_dst, &p->src)))
			return NO_FLOW;
		key_of(&key, &p->about_dst, p->sport, &p->about_src, p->dport);
		struct flow *about = bpf_map_lookup_elem(&fathom_flows, &key);
		if (!about || (about->verdict != judge->generation << 1 && !judge->keep))
			return NO_FLOW;
		return is_tracked(skb, p) ? TRACKED : UNDECIDED;
	}
	bool higher = key_of(&key, &p->src, p->sport, &p->dst, p->dport);
	if (p->begins) {
		if (is_known(skb, p))
			return TRACKED;
		// Read before the maps are, whatever the processor thinks of it.
		struct flow flow = {.verdict = __sync_fetch_and_add(&judge->generation, 0) << 1, .from_higher = higher};
		if (!allows(&p->src, &p->dst, p->dport, (own_src ? OWN_FROM : 0) | (own_dst ? OWN_TO : 0)))
			return POLICY;
		return bpf_map_update_elem(&fathom_flows, &key, &flow, BPF_ANY) ? POLICY : UNDECIDED;
	}
	struct flow *flow = bpf_map_lookup_elem(&fathom_flows, &key);
	if (!flow)
		return NO_FLOW;
	// The answer to a connection's first packet: there may be another one by now, to a Service, with the same ends.
	if (p->flags & (TCP_SYN | TCP_RST) && is_tracked(skb, p)) {
		bpf_map_delete_elem(&fathom_flows, &key);
		return TRACKED;
	}
	if (flow->ending || p->flags & (TCP_FIN | TCP_RST)) {
		__u32 now = (bpf_ktime_get_coarse_ns() >> 30) + 1;
		if (flow->ending && now - flow->ending > ENDED)
			return NO_FLOW;
		flow->ending = now;
	}
	if (judge->keep)
		return UNDECIDED;
	__u32 verdict = flow->verdict;
	if (verdict >> 1 != (judge->generation & 0x7fffffff)) {
		verdict = __sync_fetch_and_add(&judge->generation, 0) << 1;
		bool same = flow->from_higher == higher; // the packet is from who began it
		struct address from = same ? p->src : p->dst, to = same ? p->dst : p->src;
		__u32 own = ((same ? own_src : own_dst) ? OWN_FROM : 0) | ((same ? own_dst : own_src) ? OWN_TO : 0);
		if (!allows(&from, &to, same ? p->dport : p->sport, own))
			verdict |= 1;
		flow->verdict = verdict;
	}
	return verdict & 1 ? DROP_FORBIDDEN : UNDECIDED;
}

// routed does to the packet what a router does. There must be nothing left that could make it the stack's.
static inline bool routed(struct __sk_buff *skb, struct packet *p, const struct pod *to)
{
	void *data = start_of(skb), *end = end_of(skb);
	struct ethhdr *eth = data;
	if (p->v6) {
		struct ipv6hdr *ip = data + ETH_HLEN;
		if ((void *)(ip + 1) > end)
			return false;
		ip->hop_limit--;
		bpf_csum_update(skb, (__u16)~htons(1)); // of a device that sums the whole packet
	} else {
		struct iphdr *ip = data + ETH_HLEN;
		if ((void *)(ip + 1) > end)
			return false;
		__u32 check = ip->check;
		check += htons(0x0100); // RFC 1141
		ip->check = check + (check >= 0xffff);
		ip->ttl--;
	}
	if (to) {
		__builtin_memcpy(eth->h_dest, to->mac, ETH_ALEN);
		__builtin_memcpy(eth->h_source, to->host_mac, ETH_ALEN);
	}
	return true;
}

static inline bool fits(struct __sk_buff *skb, __u32 ifindex)
{
	__u32 mtu = 0;
	// Also true of no device that is gone, whose address may be another pod's by now.
	return bpf_check_mtu(skb, ifindex, &mtu, 0, BPF_MTU_CHK_SEGS) == 0;
}

static inline struct pod *pod_of(struct address *a) { return bpf_map_lookup_elem(&fathom_pods, a); }

static inline struct remote *remote_of(struct address *a)
{
	struct prefix key = {.length = 128, .address = *a};
	return bpf_map_lookup_elem(&fathom_remotes, &key);
}

// not_from says why a packet is not the pod's own.
static inline enum reason not_from(struct __sk_buff *skb, struct ethhdr *eth, struct packet *p, struct pod *from)
{
	if (from && from->ifindex == skb->ifindex)
		return same_mac(eth->h_source, from->mac) ? UNDECIDED : DROP_MAC;
	// IPv6 has addresses of its own for the link: to learn of neighbours, and to see whether an address is free.
	bool link_local = p->v6 && (p->src.word[0] & htonl(0xffc00000)) == htonl(0xfe800000);
	bool none = p->v6 && !(p->src.word[0] | p->src.word[1] | p->src.word[2] | p->src.word[3]);
	bool to_multicast = (p->dst.word[0] & htonl(0xff000000)) == htonl(0xff000000);
	bool to_link_local = (p->dst.word[0] & htonl(0xffc00000)) == htonl(0xfe800000);
	if (!(link_local && (to_multicast || to_link_local)) && !(none && to_multicast))
		return DROP_SOURCE;
	__u32 ifindex = skb->ifindex;
	struct port *port = bpf_map_lookup_elem(&fathom_ports, &ifindex);
	return port && same_mac(eth->h_source, port->mac) ? UNDECIDED : DROP_MAC;
}

static inline int from_pod_arp(struct __sk_buff *skb)
{
	struct ethhdr *eth = at(skb, 0, ETH_HLEN + sizeof(struct arphdr));
	if (!eth)
		return drop(DROP_ARP);
	struct arphdr *arp = (void *)(eth + 1);
	__u32 ifindex = skb->ifindex;
	struct port *port = bpf_map_lookup_elem(&fathom_ports, &ifindex);
	if (!port || !same_mac(eth->h_source, port->mac) || !same_mac(arp->sender_mac, port->mac))
		return drop(DROP_ARP);
	if (arp->sender) { // 0 asks whether an address is free, RFC 5227
		struct address sender;
		set4(&sender, arp->sender);
		struct pod *from = pod_of(&sender);
		if (!from || from->ifindex != ifindex)
			return drop(DROP_ARP);
	}
	return pass(ELSEWHERE);
}

SEC("tc")
int fathom_pod(struct __sk_buff *skb)
{
	struct packet p = {};
	if (skb->protocol == htons(ETH_P_ARP))
		return from_pod_arp(skb);
	if (skb->protocol != htons(ETH_P_IP) && skb->protocol != htons(ETH_P_IPV6))
		return drop(DROP_ETHERTYPE);
	if (!read(skb, &p))
		return drop(DROP_SOURCE);
	struct ethhdr *eth = at(skb, 0, ETH_HLEN);
	if (!eth)
		return drop(DROP_MAC);
	struct pod *from = pod_of(&p.src);
	enum reason why = not_from(skb, eth, &p, from);
	if (why != UNDECIDED)
		return drop(why);
	if (!from)
		return pass(ELSEWHERE);

	struct pod *to = pod_of(&p.dst);
	struct remote *via = 0;
	if (!to && !(via = remote_of(&p.dst)))
		return pass(ELSEWHERE);
	if (skb->pkt_type != PACKET_HOST || skb->vlan_present)
		return pass(NOT_OURS);
	__u32 stack = from->stack | (to ? to->stack : 0);
	if (stack & ~STACK_POLICY)
		return pass(POD_STACK);
	if (to && to->ifindex == skb->ifindex)
		return pass(SELF);
	if (p.slow != UNDECIDED)
		return pass(p.slow);
	if (p.ttl <= 1)
		return pass(TTL);
	if (stack) {
		why = judged(skb, &p, true, to != 0);
		if (why != UNDECIDED)
			return why == DROP_FORBIDDEN ? drop(why) : pass(why);
	} else if (is_known(skb, &p))
		return pass(TRACKED);
	if (to) {
		if (!fits(skb, to->ifindex) || !routed(skb, &p, to))
			return pass(MTU);
		return counted(TO_POD, bpf_redirect_peer(to->ifindex, 0));
	}
	if (!fits(skb, via->ifindex) || !routed(skb, &p, 0))
		return pass(MTU);
	struct bpf_redir_neigh next = via->via;
	return counted(TO_NODE, bpf_redirect_neigh(via->ifindex, &next, sizeof(next), 0));
}

SEC("tc")
int fathom_wire(struct __sk_buff *skb)
{
	struct packet p = {};
	if (skb->protocol != htons(ETH_P_IP) && skb->protocol != htons(ETH_P_IPV6))
		return TC_ACT_UNSPEC;
	if (skb->pkt_type != PACKET_HOST || skb->vlan_present || !read(skb, &p))
		return TC_ACT_UNSPEC;
	struct pod *to = pod_of(&p.dst);
	if (!to)
		return TC_ACT_UNSPEC; // the node's own, for the most part: not worth a count
	if (to->stack & ~STACK_POLICY)
		return pass(POD_STACK);
	if (p.slow != UNDECIDED)
		return pass(p.slow);
	if (p.icmp_error) {
		// An error comes from whoever met it, such as a router on the way that has a small MTU. To conntrack, which
		// knows nothing of the connection, it would be invalid, and rules may drop it.
		if (pod_of(&p.about_src) != to || !remote_of(&p.about_dst))
			return pass(PROTOCOL);
	} else if (!remote_of(&p.src))
		return pass(ELSEWHERE);
	if (p.ttl <= 1)
		return pass(TTL);
	if (to->stack) {
		enum reason why = judged(skb, &p, false, true);
		if (why != UNDECIDED)
			return why == DROP_FORBIDDEN ? drop(why) : pass(why);
	} else if (is_tracked(skb, &p))
		return pass(TRACKED);
	if (!fits(skb, to->ifindex) || !routed(skb, &p, to))
		return pass(MTU);
	return counted(FROM_NODE, bpf_redirect_peer(to->ifindex, 0));
}

char fathom_license[] SEC("license") = "GPL"; // the kernel lets no other call its functions
