// What the programs here need of the kernel's interface, which is stable: no header of a distribution is asked for, so that
// the same compiler makes the same object everywhere. Names are those of linux/bpf.h and its neighbours.
// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
#ifndef FATHOM_KERNEL_H
#define FATHOM_KERNEL_H

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef int __s32;
typedef unsigned long long __u64;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef _Bool bool;
#define true 1
#define false 0

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define htons(x) ((__be16)__builtin_bswap16((__u16)(x)))
#define htonl(x) ((__be32)__builtin_bswap32((__u32)(x)))
#else
#define htons(x) ((__be16)(x))
#define htonl(x) ((__be32)(x))
#endif

#define SEC(name) __attribute__((section(name), used))
#define inline __inline __attribute__((always_inline))
#define unlikely(x) __builtin_expect(!!(x), 0)

// Maps, as BTF tells them to the loader.
#define __uint(name, value) int (*name)[value]
#define __type(name, value) typeof(value) *name

enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_HASH = 5,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_CGROUP_ARRAY = 8,
	BPF_MAP_TYPE_LRU_HASH = 9,
	BPF_MAP_TYPE_LPM_TRIE = 11,
	BPF_MAP_TYPE_SK_STORAGE = 24,
	BPF_F_NO_PREALLOC = 1,
	BPF_ANY = 0,
	BPF_NOEXIST = 1,
	BPF_SK_STORAGE_GET_F_CREATE = 1,
	PIN_BY_NAME = 1,
};

enum {
	TC_ACT_UNSPEC = -1, // goes on to who comes next; TC_ACT_OK would skip the queueing disciplines' filters
	TC_ACT_SHOT = 2,
};

enum {
	AF_INET = 2,
	AF_INET6 = 10,
	ETH_ALEN = 6,
	ETH_HLEN = 14,
	ETH_P_IP = 0x0800,
	ETH_P_ARP = 0x0806,
	ETH_P_IPV6 = 0x86dd,
	PACKET_HOST = 0,
	IPPROTO_ICMP = 1,
	IPPROTO_TCP = 6,
	IPPROTO_UDP = 17,
	IPPROTO_ICMPV6 = 58,
	TCP_ESTABLISHED = 1, // of UDP sockets: connected
	ENOENT = 2,
	EEXIST = 17,
	ECONNREFUSED = 111,
	BPF_MTU_CHK_SEGS = 1,
};

struct __sk_buff {
	__u32 len;
	__u32 pkt_type;
	__u32 mark;
	__u32 queue_mapping;
	__u32 protocol;
	__u32 vlan_present;
	__u32 vlan_tci;
	__u32 vlan_proto;
	__u32 priority;
	__u32 ingress_ifindex;
	__u32 ifindex;
	__u32 tc_index;
	__u32 cb[5];
	__u32 hash;
	__u32 tc_classid;
	__u32 data;
	__u32 data_end;
};

struct ethhdr {
	__u8 h_dest[ETH_ALEN];
	__u8 h_source[ETH_ALEN];
	__be16 h_proto;
} __attribute__((packed));

struct iphdr {
	__u8 version_ihl;
	__u8 tos;
	__be16 tot_len;
	__be16 id;
	__be16 frag_off;
	__u8 ttl;
	__u8 protocol;
	__u16 check;
	__be32 saddr;
	__be32 daddr;
} __attribute__((packed, aligned(2)));

struct ipv6hdr {
	__be32 flow;
	__be16 payload_len;
	__u8 nexthdr;
	__u8 hop_limit;
	__be32 saddr[4];
	__be32 daddr[4];
} __attribute__((packed, aligned(2)));

struct arphdr {
	__be16 htype;
	__be16 ptype;
	__u8 hlen;
	__u8 plen;
	__be16 op;
	__u8 sender_mac[ETH_ALEN];
	__be32 sender;
	__u8 target_mac[ETH_ALEN];
	__be32 target;
} __attribute__((packed, aligned(2)));

struct bpf_sock_tuple {
	union {
		struct {
			__be32 saddr;
			__be32 daddr;
			__be16 sport;
			__be16 dport;
		} ipv4;
		struct {
			__be32 saddr[4];
			__be32 daddr[4];
			__be16 sport;
			__be16 dport;
		} ipv6;
	};
};

struct bpf_redir_neigh {
	__u32 nh_family;
	__be32 nh[4]; // the first word is an IPv4 address
};

// The context of programs at connect(), sendmsg(), recvmsg() and getpeername().
struct bpf_sock_addr {
	__u32 user_family;
	__be32 user_ip4;
	__be32 user_ip6[4];
	__u32 user_port; // a __be16
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 msg_src_ip4;
	__u32 msg_src_ip6[4];
	union {
		struct bpf_sock *sk;
		__u64 : 64;
	} __attribute__((aligned(8)));
};

struct bpf_sock {
	__u32 bound_dev_if;
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 mark;
	__u32 priority;
	__u32 src_ip4;
	__u32 src_ip6[4];
	__u32 src_port;
	__be16 dst_port;
	__u16 : 16;
	__u32 dst_ip4;
	__u32 dst_ip6[4];
	__u32 state;
};

struct bpf_spin_lock {
	__u32 val;
};

// The kernel's own structure, of which the loader finds the part that is named here; it begins every kind of socket's.
struct sock {
	__u8 sk_kern_sock : 1;
} __attribute__((preserve_access_index));

// What __builtin_preserve_field_info may be asked for.
enum {
	BPF_FIELD_BYTE_OFFSET = 0,
	BPF_FIELD_LSHIFT_U64 = 4,
};

static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*const bpf_map_update_elem)(void *map, const void *key, const void *value, __u64 flags) = (void *)2;
static long (*const bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static __u64 (*const bpf_ktime_get_ns)(void) = (void *)5;
static __u32 (*const bpf_get_prandom_u32)(void) = (void *)7;
static long (*const bpf_get_current_comm)(void *to, __u32 size) = (void *)16;
static long (*const bpf_current_task_under_cgroup)(void *map, __u32 index) = (void *)37;
static long (*const bpf_skb_pull_data)(struct __sk_buff *skb, __u32 len) = (void *)39;
static __s32 (*const bpf_csum_update)(struct __sk_buff *skb, __u32 csum) = (void *)40;
static __u64 (*const bpf_get_socket_cookie)(void *ctx) = (void *)46;
static __u64 (*const bpf_get_netns_cookie)(void *ctx) = (void *)122;
static void (*const bpf_spin_lock)(struct bpf_spin_lock *lock) = (void *)93;
static void (*const bpf_spin_unlock)(struct bpf_spin_lock *lock) = (void *)94;
static void *(*const bpf_sk_storage_get)(void *map, void *sk, void *value, __u64 flags) = (void *)107;
static void *(*const bpf_skc_to_tcp_sock)(void *sk) = (void *)137;
static long (*const bpf_redirect_neigh)(__u32 ifindex, struct bpf_redir_neigh *params, int plen, __u64 flags) = (void *)152;
static long (*const bpf_redirect_peer)(__u32 ifindex, __u64 flags) = (void *)155;
static long (*const bpf_check_mtu)(void *ctx, __u32 ifindex, __u32 *mtu_len, __s32 len_diff, __u64 flags) = (void *)163;
static __u64 (*const bpf_ktime_get_coarse_ns)(void) = (void *)160;
static int (*const bpf_set_retval)(int retval) = (void *)187;

// The part of the options that every kernel with these functions has (NF_BPF_CT_OPTS_SZ is 12 or 16).
struct bpf_ct_opts {
	__s32 netns_id;
	__s32 error;
	__u8 l4proto;
	__u8 dir;
	__u8 reserved[2];
};
struct nf_conn {
	unsigned long status;
} __attribute__((preserve_access_index)); // the loader compares names, and wants a whole struct for that
extern struct nf_conn *bpf_skb_ct_lookup(struct __sk_buff *skb, struct bpf_sock_tuple *tuple, __u32 tuple__sz,
	struct bpf_ct_opts *opts, __u32 opts__sz) __attribute__((weak, section(".ksyms")));
extern void bpf_ct_release(struct nf_conn *ct) __attribute__((weak, section(".ksyms")));

#endif
