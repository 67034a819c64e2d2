package main

import (
	"context"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// shortList is what CI runs: specs that take seconds and fail when something of importance does. In this order:
// pods reach pods, over TCP and over UDP; a Service has its endpoints; it is reached by its address, by a node's
// port, and from one client always the same pod; its name resolves.
var shortList = []string{
	"Networking Granular Checks: Pods should function for intra-pod communication: http [NodeConformance] [Conformance]",
	"Networking Granular Checks: Pods should function for intra-pod communication: udp [NodeConformance] [Conformance]",
	"Services should serve multiport endpoints from pods [Conformance]",
	"Services should be able to change the type from ExternalName to ClusterIP [Conformance]",
	"Services should be able to create a functioning NodePort service [Conformance]",
	"Services should have session affinity work for service with type clusterIP [LinuxOnly] [Conformance]",
	"DNS should provide DNS for services [Conformance]",
}

// machine is what of this machine decides whether a spec can pass.
type machine struct {
	sctp     bool // the kernel has SCTP sockets
	forwards bool // it forwards IPv4, so that a lab has a way out
	internet bool // connections to the Internet are made, by IPv4
	ipv6     bool // and by IPv6
	names    bool // its names are resolved
	iperf    string
}

// probe finds out.
func probe() machine {
	var m machine
	if fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP); err == nil {
		unix.Close(fd)
		m.sctp = true
	}
	if v, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward"); err == nil {
		m.forwards = strings.TrimSpace(string(v)) == "1"
	}
	// What the specs try to reach.
	if c, err := net.DialTimeout("tcp", "8.8.8.8:53", 2*time.Second); err == nil {
		c.Close()
		m.internet = true
	}
	if c, err := net.DialTimeout("tcp", "[2001:4860:4860::8888]:53", 2*time.Second); err == nil {
		c.Close()
		m.ipv6 = true
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	if _, err := net.DefaultResolver.LookupHost(ctx, "google.com"); err == nil {
		m.names = true
	}
	// The image of the tests has this machine's iperf.
	out, _ := exec.Command("iperf", "-v").CombinedOutput()
	if found := regexp.MustCompile(`version (\d+\.\d+\.\d+)`).FindSubmatch(out); found != nil {
		m.iperf = string(found[1])
	}
	return m
}

// leftOut says why a spec cannot pass in that setting on that machine, or nothing if it can. What is not known
// beforehand is not here: upstream's specs look for themselves whether a cluster has what they need, and say so.
// A spec that fails is never put here for that: the reason is a thing that is missing and can be named.
func leftOut(spec string, s setting, m machine) string {
	has := func(tag string) bool { return strings.Contains(spec, tag) }
	// The networks and proxies that are known not to do a thing; of others, the specs tell.
	plain := s.Network == "bridge" || s.Network == "flannel"
	switch {
	case has("[Feature:KubeProxyDaemonSetMigration]"):
		return "exchanges kube-proxy with the scripts of a cluster on Google Cloud"
	case (has("should check kube-proxy urls") || has("[Feature:KubeProxyNFAcct]")) && s.Proxy != "kube-proxy":
		return "asks kube-proxy for its mode, and it is not there"
	case has("[Feature:SCTPConnectivity]") && !m.sctp:
		return "this kernel has no SCTP"
	case has("[Feature:LoadBalancer]") && plain:
		return "nothing in this lab gives a Service of type LoadBalancer an address"
	case has("[Feature:LoadBalancer] [Slow] should work for type=LoadBalancer"):
		return "takes a client of the nodes' /16 for a node, and there is the lab's host; the scenario balancer looks at the same"
	case has("should only allow access from service loadbalancer source ranges") && s.Family == "ipv6":
		return "the spec gives wget an IPv6 address without brackets"
	case has("ExternalTrafficPolicy: Local [Feature:LoadBalancer] [Slow] should work from pods") && s.Family == "ipv6":
		return "the spec takes what is before the first colon for the client's address"
	case has("[Feature:NetworkPolicy]") && plain:
		return "the network " + s.Network + " has no NetworkPolicy"
	case has("[Feature:IPv6DualStack]") && s.Family != "dual":
		return "needs a dual-stack cluster: --ip-family dual"
	case has("[Feature:Networking-IPv4]") && s.Family == "ipv6":
		return "needs a cluster with IPv4"
	case has("[Feature:Networking-IPv6]") && s.Family == "ipv4":
		return "needs a cluster with IPv6"
	case (has("[Feature:Networking-IPv4]") || has("[Feature:Networking-DNS]")) && !m.forwards:
		return "connects to the Internet, and this machine does not forward: net.ipv4.ip_forward is 0"
	case has("[Feature:Networking-IPv4]") && !m.internet, has("[Feature:Networking-IPv6]") && !m.ipv6:
		return "connects to the Internet, to which this machine has no way"
	case has("[Feature:Networking-DNS]") && !m.names:
		return "connects to google.com, and this machine does not resolve the Internet's names"
	case has("should forward PTR records lookup") && !m.names:
		return "asks for the name of 8.8.8.8, and this machine does not resolve the Internet's names"
	case has("[Feature:PerformanceDNS]"):
		return "measures DNS with 10,000 Services; ask for it with ALL=1"
	case has("[Feature:Networking-Performance]") && !atLeast(m.iperf, 2, 2):
		return "reads the output of iperf 2.2 or later; the image has this machine's, " + orNone(m.iperf)
	}
	return ""
}

func orNone(version string) string {
	if version == "" {
		return "and it has none"
	}
	return version
}

func atLeast(version string, want ...int) bool {
	parts := strings.Split(version, ".")
	for i, w := range want {
		if i >= len(parts) {
			return false
		}
		n, err := strconv.Atoi(parts[i])
		if err != nil || n < w {
			return false
		}
		if n > w {
			return true
		}
	}
	return true
}

// breaksOthers says whether a spec harms what runs beside it. Ginkgo keeps [Serial] ones apart by itself.
func breaksOthers(spec string) bool { return strings.Contains(spec, "[Disruptive]") }
