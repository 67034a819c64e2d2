#!/bin/sh
# bench.sh FATHOM-DNS COREDNS [SECONDS] measures the node's cache beside CoreDNS alone, in namespaces of its own: a pod, its
# node, and a pod of CoreDNS on the node's other side, with routed veth pairs between. It needs root, and dnsperf of
# Debian's package of that name. "New names" are asked for once each; MILLION=1 asks a million questions more. Then it
# ends CoreDNS, without a last word, and starts it again, while 100 clients ask. In the end another pod floods the cache
# with questions, each for a name of its own, to which the server beyond CoreDNS is silent: 12,000 a second, and then as
# many as it can, while the pod asks for what the cache knows and for new names. FLOOD=1 does that alone.
#
# CoreDNS has the plugin file in the place of kubernetes, which would need an API server; both answer from memory.
set -eu
cache=$(realpath "$1") server=$(realpath "$2") seconds=${3:-5}
work=$(mktemp -d)
pids=""
end() {
	for p in $pids; do kill "$p" 2>/dev/null || true; done
	wait 2>/dev/null || true
	for n in pod flood node dns; do ip netns del "fathom-bench-$n" 2>/dev/null || true; done
	rm -rf "$work"
}
trap end EXIT INT TERM
in_ns() { n=$1; shift; ip netns exec "fathom-bench-$n" "$@"; }

for n in pod flood node dns; do
	ip netns add "fathom-bench-$n"
	in_ns $n ip link set lo up
done
join() { # join POD ADDRESS
	ip link add "to-$1" netns fathom-bench-node type veth peer name eth0 netns "fathom-bench-$1"
	in_ns node ip link set "to-$1" up
	in_ns node ip addr add "169.254.1.1/32" dev "to-$1" 2>/dev/null || true
	in_ns node ip route add "$2/32" dev "to-$1"
	in_ns "$1" ip addr add "$2/32" dev eth0
	in_ns "$1" ip link set eth0 up
	in_ns "$1" ip route add 169.254.1.1 dev eth0
	in_ns "$1" ip route add default via 169.254.1.1
}
join pod 10.244.1.2
join flood 10.244.1.3
join dns 10.244.2.2
in_ns node sysctl -qw net.ipv4.ip_forward=1
in_ns node ip addr add 169.254.20.10/32 dev lo
in_ns node nft 'table ip silent { chain forward { type filter hook prerouting priority -300; ip daddr 192.0.2.1 drop; }; }'

cat >"$work/Corefile" <<EOF
.:53 {
	errors
	file $work/cluster.zone cluster.local
	template IN A example.com {
		answer "{{ .Name }} 30 IN A 192.0.2.1"
	}
	template IN AAAA example.com {
		answer "{{ .Name }} 30 IN AAAA 2001:db8::1"
	}
	cache 30 {
		disable success cluster.local
		disable denial cluster.local
	}
	loadbalance
}
silent.test:53 {
	forward . 192.0.2.1 {
		max_fails 0
	}
}
EOF
{
	printf '$ORIGIN cluster.local.\n@ 30 IN SOA ns.dns hostmaster 1 7200 1800 86400 30\n@ 30 IN NS ns.dns\nns.dns 30 IN A 10.96.0.10\n'
	i=0
	while [ $i -lt 1000 ]; do
		echo "web$i.default.svc 30 IN A 10.96.$((i / 250)).$((i % 250))"
		i=$((i + 1))
	done
} >"$work/cluster.zone"
echo "search kube-system.svc.cluster.local svc.cluster.local cluster.local" >"$work/resolv.conf"

# What resolvers ask with ndots:5: a Service by its short name, and names outside of the cluster.
i=0
while [ $i -lt 100 ]; do
	for t in A AAAA; do
		echo "web$i.default.svc.cluster.local $t"
		for d in .default.svc.cluster.local .svc.cluster.local .cluster.local ""; do echo "www$i.example.com$d $t"; done
	done
	i=$((i + 1))
done >"$work/queries"

# Names that nobody has asked for before, for each round and each of both.
i=0
while [ $i -lt 8 ]; do
	seq -f "new%.0f.example.com A" $((i * 10000)) $((i * 10000 + 9999)) >"$work/new$i"
	i=$((i + 1))
done
seq -f "n%.0f.silent.test A" 1000000 1500000 >"$work/silent"

# answers NODE FLAGS SOCKET PID LOG waits until a program listens, and says why it does not.
answers() {
	until in_ns "$1" ss "$2" | grep -q "$3"; do
		if ! kill -0 "$4" 2>/dev/null; then
			echo "bench.sh: it ended before it listened:" >&2
			cat "$5" >&2
			exit 1
		fi
		sleep 0.05
	done
}

start_server() {
	# Not by in_ns: of a function the shell makes a process of its own, and to kill that one would leave the program.
	ip netns exec fathom-bench-dns "$server" -conf "$work/Corefile" >>"$work/server.log" 2>&1 &
	server_pid=$!
	pids="$pids $server_pid"
	answers dns -lntH ':53 ' "$server_pid" "$work/server.log"
}
start_server
ip netns exec fathom-bench-node "$cache" -upstream 10.244.2.2:53 -resolv-conf "$work/resolv.conf" -corefile "$work/Corefile" >"$work/cache.log" 2>&1 &
cache_pid=$!
pids="$pids $cache_pid"
answers node -lnuH '169.254.20.10:53 ' "$cache_pid" "$work/cache.log"

run() { # run NAME ADDRESS FILE ARGUMENT...
	name=$1 addr=$2 file=$3
	shift 3
	in_ns pod dnsperf -s "$addr" -d "$work/$file" -t 5 -v "$@" >"$work/out" 2>&1 || true
	awk -v name="$name" '
		$1 == ">" { n = int($NF * 1e5); count[n]++; all++; if (n > most) most = n; next } # of 10 us each
		/Queries sent:/ { sent = $3 } /Queries lost:/ { lost = $3 } /Queries per second:/ { qps = $4 }
		/Response codes:/ { codes = $0; sub(/.*Response codes: */, "", codes) }
		/Average Latency/ { avg = $4; max = $8; sub(/\)/, "", max) }
		END {
			for (i = 0; i <= most; i++) { sum += count[i]; if (sum >= 0.99 * all) break }
			printf "%s\t%d/s\t%.3f ms\t%.2f ms\t%.2f ms\t%d\t%d\t%s\n", name, qps, avg * 1e3, (i + 1) / 100, max * 1e3, sent, lost, codes
		}' "$work/out"
}
speed() {
	for round in 1 2; do
		run "CoreDNS alone" 10.244.2.2 queries -l "$seconds" -c 100 -q 100
		run "through the node's cache" 169.254.20.10 queries -l "$seconds" -c 100 -q 100
		run "new names, CoreDNS alone" 10.244.2.2 "new$((round * 2 - 2))" -n 1 -c 100 -q 100
		run "new names, node's cache" 169.254.20.10 "new$((round * 2 - 1))" -n 1 -c 100 -q 100
	done
	run "5,000/s, CoreDNS alone" 10.244.2.2 queries -l "$seconds" -c 100 -q 100 -Q 5000
	run "5,000/s, node's cache" 169.254.20.10 queries -l "$seconds" -c 100 -q 100 -Q 5000
	[ -z "${MILLION:-}" ] || run "a million" 169.254.20.10 queries -n 1000 -c 100 -q 100 # of 1,000 questions

	(
		sleep 2
		kill -9 "$server_pid"
		sleep 5
		exec ip netns exec fathom-bench-dns "$server" -conf "$work/Corefile" >>"$work/server.log" 2>&1
	) &
	pids="$pids $!"
	run "CoreDNS ended for 5 s" 169.254.20.10 queries -l 15 -c 100 -q 100 -Q 5000
}

# flood NAME NEW ARGUMENT... floods while the pod asks, first for what is known and then for the new names in a file.
flood() {
	flood_name=$1 new=$2
	shift 2
	ip netns exec fathom-bench-flood dnsperf -s 169.254.20.10 -d "$work/silent" -n 100 -l $((2 * seconds + 3)) -t 5 -c 50 -q 12000 "$@" >"$work/flood" 2>&1 &
	flood_pid=$!
	pids="$pids $flood_pid"
	( # which files and goroutines there are, at most
		files=0 goroutines=0
		while kill -0 "$flood_pid" 2>/dev/null; do
			n=$(find "/proc/$cache_pid/fd" -mindepth 1 2>/dev/null | wc -l)
			[ "$n" -le "$files" ] || files=$n
			n=$(in_ns node curl -s -m 2 http://127.0.0.1:10473/metrics | awk '$1 == "go_goroutines" { print $2 }')
			[ "${n:-0}" -le "$goroutines" ] || goroutines=$n
			echo "$files open files, $goroutines goroutines" >"$work/most"
			sleep 0.3
		done
	) &
	watch_pid=$!
	sleep 1
	run "$flood_name, known names" 169.254.20.10 queries -l "$seconds" -c 20 -q 100 -Q 1000
	run "$flood_name, new names" 169.254.20.10 "$new" -l "$seconds" -n 1 -c 20 -q 100 -Q 1000
	wait "$flood_pid" "$watch_pid" || true
	echo "$flood_name: $(awk '/Queries sent/ { print $3 }' "$work/flood") questions in $((2 * seconds + 3)) s; the cache had at most $(cat "$work/most"), $(awk '/VmHWM/ { print int($2 / 1024) }' "/proc/$cache_pid/status") MiB of memory"
}

printf 'questions\trate\tmean\tp99\tmax\tsent\tlost\tanswers\n'
if [ -z "${FLOOD:-}" ]; then
	speed
else
	run "warm" 169.254.20.10 queries -n 1 -c 20 -q 100 >"$work/warm"
fi
run "no flood, known names" 169.254.20.10 queries -l "$seconds" -c 20 -q 100 -Q 1000
run "no flood, new names" 169.254.20.10 new6 -l "$seconds" -n 1 -c 20 -q 100 -Q 1000
flood "flood of 12,000/s" new4 -Q 12000
flood "flood without a limit" new5
tail -n 5 "$work/cache.log" >&2
