#!/bin/sh
# A veth pair whose ends have different MTUs carries TCP in bulk, and loses single packets of the same size without a word.
#
# Kernel:   Linux, seen on 6.18; ends of a pair get different MTUs where a CNI plugin and an administrator, or two plugins in a
#           chain, each set one.
# Expected: a packet that is larger than the MTU of the end where it arrives is too big for all, or for none: MTU bounds what is
#           sent, and Ethernet devices take what they get. If it is too big, there is an ICMP message, or an error.
# Instead:  is_skb_forwardable() in net/core/dev.c drops a packet that is larger than the receiving end's MTU, 14 bytes of header
#           and 4 of a VLAN tag, but lets any packet through that is to be segmented later (GSO). TCP in bulk is such packets. What
#           is dropped is counted as dropped by the *sending* end (tx), and nobody is told.
# Known:    the comment in is_skb_forwardable(); not in the manual pages of ip-link or veth.
#           Of a transfer all arrives, or all but the last segments, if those were sent alone.
# Means:    a download tells nothing about the MTU: a connection runs at full speed until one segment is sent alone, as after a
#           loss, and then sends it again and again to no end. Look at `ip -s link` on the pod's side, or ping with the
#           full size; and give both ends one MTU.
#
# Needs ip, ping, socat and ethtool, and root or user namespaces; it works in network namespaces of its own.
set -eu
case ${1-} in
inside) ;;
*) exec unshare --user --map-root-user --net --mount -- "$0" inside ;;
esac

work=$(mktemp -d)
pods=
trap 'kill $pods 2>/dev/null || true; rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
echo 1 >/proc/sys/net/ipv4/ip_forward
for i in 1 2; do
	unshare --net -- sleep 120 &
	pid=$!
	pods="$pods $pid"
	eval "pod$i=$pid"
	until [ "$(readlink /proc/$pid/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
	ip link add "pod$i" type veth peer name eth0 netns "$pid"
	ip address add "10.9.$i.1/24" dev "pod$i"
	ip link set "pod$i" up
	nsenter --target "$pid" --net -- sh -c "ip link set eth0 up && ip address add 10.9.$i.2/24 dev eth0 && ip route add default via 10.9.$i.1"
done
in_pod() { eval "pid=\$pod$1"; shift; nsenter --target "$pid" --net -- "$@"; }
ip link set pod1 mtu 1300 # the pod's own end stays at 1500

ping_full() { in_pod 1 ping -c 3 -i 0.2 -W 1 -M do -s 1400 10.9.2.2 2>&1 || true; }

# What of 4 MiB arrives within five seconds.
bulk() {
	in_pod 2 timeout 8 socat -u TCP-LISTEN:8080,reuseaddr "OPEN:$work/got,creat,trunc" &
	server=$!
	until in_pod 2 ss -ltn | grep -q :8080; do sleep 0.1; done
	in_pod 1 timeout 5 sh -c 'head -c 4194304 /dev/zero | socat -u - TCP:10.9.2.2:8080' || true
	wait "$server" || true
	stat -c %s "$work/got"
}

dropped() { in_pod 1 ip -s -s link show eth0 | awk '/TX:/ { getline; print $4; exit }'; }

uname -sr
echo "pod 1: eth0 has an MTU of 1500, the node's end of the pair 1300; everything else 1500"
before=$(dropped)
answer=$(ping_full)
after=$(dropped)
echo "ping with packets of 1428 bytes: $(echo "$answer" | grep transmitted)"
echo "dropped, as eth0 of the pod counts it: $((after - before))"
whole=$(bulk)
echo "TCP: $whole of 4194304 bytes arrive"
in_pod 1 ethtool -K eth0 tso off gso off >/dev/null
alone=$(bulk)
echo "TCP without segmentation by the device: $alone"

case $answer in *"3 packets transmitted, 0 received"*) ;; *) echo "CHANGED: full packets arrive"; exit 1 ;; esac
case $answer in *"too long"* | *"Frag needed"* | *error*) echo "CHANGED: the sender is told"; exit 1 ;; esac
[ $((after - before)) -ge 3 ] || { echo "CHANGED: it is counted elsewhere"; exit 1; }
[ "$whole" -ge 4000000 ] || { echo "CHANGED: TCP in bulk does not arrive"; exit 1; }
[ "$alone" -lt 4194304 ] || { echo "CHANGED: TCP arrives without segmentation by the device"; exit 1; }
echo "as described"
