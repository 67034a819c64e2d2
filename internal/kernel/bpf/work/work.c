//go:build ignore

// What the processes of a cgroup do, counted by the name of the thread that does it: docs/design/lab.md.
//
// All programs run at tracepoints, in the context of the thread that they count for. They ask for no field of the kernel's
// structures, and so work with every kernel that has the tracepoints.
// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
#include "../kernel.h"

struct bpf_raw_tracepoint_args {
	__u64 args[0];
};

enum {
	CLONE_THREAD = 0x00010000,
};

// fathom_group has the cgroup.
struct {
	__uint(type, BPF_MAP_TYPE_CGROUP_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} fathom_group SEC(".maps");

struct name {
	__u8 comm[16];
};
struct counts {
	__u64 nanoseconds; // on a processor
	__u64 processes;   // that it started
	__u64 threads;     // that it started
	__u64 execs;
	__u64 syscalls;
	__u64 faults; // of pages
};
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct name);
	__type(value, struct counts);
} fathom_counts SEC(".maps");

// fathom_switched is when this processor last went from one thread to another.
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} fathom_switched SEC(".maps");

static inline bool inside(void) { return bpf_current_task_under_cgroup(&fathom_group, 0) == 1; }

// here returns the counts of the thread that runs, or NULL if there is no room for another name.
static inline struct counts *here(void)
{
	struct name name = {};
	bpf_get_current_comm(&name, sizeof name);
	struct counts *c = bpf_map_lookup_elem(&fathom_counts, &name);
	if (c)
		return c;
	struct counts none = {};
	bpf_map_update_elem(&fathom_counts, &name, &none, BPF_NOEXIST); // another processor may be first
	return bpf_map_lookup_elem(&fathom_counts, &name);
}

// A thread that is preempted within a program, on kernels where that is possible, must not lose another one's count.
#define COUNT(field, n)                                     \
	do {                                                \
		if (!inside())                              \
			return 0;                           \
		struct counts *c = here();                  \
		if (c)                                      \
			__sync_fetch_and_add(&c->field, n); \
		return 0;                                   \
	} while (0)

SEC("raw_tracepoint/sys_enter")
int fathom_sys_enter(void *ctx) { COUNT(syscalls, 1); }

SEC("raw_tracepoint/page_fault_user")
int fathom_page_fault_user(void *ctx) { COUNT(faults, 1); }

SEC("raw_tracepoint/page_fault_kernel") // where the kernel copies from and to the process
int fathom_page_fault_kernel(void *ctx) { COUNT(faults, 1); }

SEC("raw_tracepoint/sched_process_exec") // the new program has its name by then
int fathom_sched_process_exec(void *ctx) { COUNT(execs, 1); }

SEC("raw_tracepoint/task_newtask") // (task, clone_flags), in the context of the parent
int fathom_task_newtask(struct bpf_raw_tracepoint_args *ctx)
{
	if (ctx->args[1] & CLONE_THREAD)
		COUNT(threads, 1);
	COUNT(processes, 1);
}

SEC("raw_tracepoint/sched_switch") // in the context of the thread that gives the processor up
int fathom_sched_switch(void *ctx)
{
	__u32 zero = 0;
	__u64 *switched = bpf_map_lookup_elem(&fathom_switched, &zero);
	if (!switched)
		return 0;
	__u64 now = bpf_ktime_get_ns(), since = *switched;
	*switched = now;
	if (since == 0)
		return 0;
	COUNT(nanoseconds, now - since);
}

char fathom_license[] SEC("license") = "GPL"; // the kernel lets no other call its functions
