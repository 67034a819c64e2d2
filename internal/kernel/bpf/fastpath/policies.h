// What policies allow, as maps have it: docs/design/fastpath.md.
// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)

// STACK_POLICY is the reason of pod.stack by which policies are asked.
#define STACK_POLICY (1 << 3)

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

// identities are the addresses of all pods of the cluster.
struct identity {
	__u16 number;
	__u16 judged;  // 1 of a pod of this node whose policies these maps hold, all of them
	__u16 ingress; // its classes; 0 is not isolated
	__u16 egress;
};
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, struct address);
	__type(value, struct identity);
} fathom_identities SEC(".maps");

// allowed are the ports of TCP that pods of a class may be reached at, or may reach, by a peer: an identity, 0 for anyone, or a block of
// addresses. A range of ports is some prefixes, and all ports are the shortest.
struct allowed_key {
	__u32 length; // 48 and the bits of the port
	__u32 peer;
	__u16 class;
	__be16 port;
};
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 524288);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, struct allowed_key);
	__type(value, __u32);
} fathom_allowed SEC(".maps");

// blocks are the addresses that a class allows something with: as which peer they are to be looked up in allowed.
struct block_key {
	__u32 length; // 32 and the bits of the address
	__u32 class;
	struct address address;
};
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 524288);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, struct block_key);
	__type(value, __u32);
} fathom_blocks SEC(".maps");

// flows are the connections that were judged here.
struct flow_key {
	struct address low, high;
	__be16 low_port, high_port;
};
struct flow {
	__u32 verdict; // the generation by which it was judged, times 2; and 1 if it is not allowed
	__u32 ending;  // if it is ending, when the last packet passed, in units of 2^30 ns
	__u32 from_higher; // which end began it
};
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__uint(pinning, PIN_BY_NAME);
	__type(key, struct flow_key);
	__type(value, struct flow);
} fathom_flows SEC(".maps");

// ENDED is how long after the last packet a connection that was ending is one no more: 120 s, as conntrack has it.
#define ENDED 112

struct judge {
	__u32 generation; // of the maps above: what was judged by another one is judged again
	__u32 on;         // they hold what policies say
	__u32 keep;       // connections that are there stay allowed
};
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(pinning, PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct judge);
} fathom_judge SEC(".maps");

static inline bool same_address(const struct address *a, const struct address *b)
{
	return ((a->word[0] ^ b->word[0]) | (a->word[1] ^ b->word[1]) | (a->word[2] ^ b->word[2]) | (a->word[3] ^ b->word[3])) == 0;
}

// class_allows says what ruleset's judge_ingress and judge_egress do: by the peer's identity, as anyone, by the address.
static __attribute__((noinline)) bool class_allows(__u16 class, __u32 number, const struct address *peer, __be16 port)
{
	struct allowed_key key = {.length = 64, .peer = number, .class = class, .port = port};
	if (bpf_map_lookup_elem(&fathom_allowed, &key))
		return true;
	if (number) {
		key.peer = 0;
		if (bpf_map_lookup_elem(&fathom_allowed, &key))
			return true;
	}
	struct block_key block = {.length = 160, .class = class, .address = *peer};
	__u32 *as = bpf_map_lookup_elem(&fathom_blocks, &block);
	if (!as)
		return false;
	key.peer = *as;
	return bpf_map_lookup_elem(&fathom_allowed, &key);
}

#define OWN_FROM 1
#define OWN_TO 2

// allows says whether a connection may begin. own says which ends are pods of this node: of others nothing follows.
static __attribute__((noinline)) bool allows(const struct address *from, const struct address *to, __be16 port, __u32 own)
{
	struct identity *a = bpf_map_lookup_elem(&fathom_identities, from), *b = bpf_map_lookup_elem(&fathom_identities, to);
	if (own & OWN_FROM) {
		if (!a || !a->judged)
			return false;
		if (a->egress && !class_allows(a->egress, b ? b->number : 0, to, port))
			return false;
	}
	if (own & OWN_TO) {
		if (!b || !b->judged)
			return false;
		if (b->ingress && !class_allows(b->ingress, a ? a->number : 0, from, port))
			return false;
	}
	return true;
}
