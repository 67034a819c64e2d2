package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"
)

// options are what the Corefile is made of.
type options struct {
	Listen          []netip.Addr
	Port            int
	Upstream        string
	Search          []string // a pod's, without the domain of its namespace
	Health, Metrics string
}

// corefile is the configuration of CoreDNS.
func (o options) corefile() string {
	var b strings.Builder
	fmt.Fprintf(&b, ".:%d {\n\tbind", o.Port)
	for _, a := range o.Listen {
		fmt.Fprintf(&b, " %s", a)
	}
	fmt.Fprintf(&b, "\n\terrors {\n\t\tconsolidate 10s \".*\" warning show_first\n\t}\n")
	// The agent asks for version.bind whether anybody is there.
	fmt.Fprintf(&b, "\tchaos fathom-dns\n\thealth %s\n\tprometheus %s\n\tloadbalance\n", o.Health, o.Metrics)
	fmt.Fprintf(&b, "\tnodecache %s\n}\n", strings.Join(append([]string{o.Upstream}, o.Search...), " "))
	return b.String()
}

// upstreamOf is the address of Service kube-dns-upstream, which kubelet tells containers of the namespace.
func upstreamOf(getenv func(string) string) (string, error) {
	host := getenv("KUBE_DNS_UPSTREAM_SERVICE_HOST")
	if host == "" {
		return "", errors.New("there is no Service kube-dns-upstream in the namespace, or it was made after this pod; give -upstream HOST:PORT, or delete the pod")
	}
	return net.JoinHostPort(host, "53"), nil
}

// searchList reads the search list of a pod's resolv.conf, which begins with NAMESPACE.svc.DOMAIN; one that does not is
// nobody's whom we answer, and of no use. What follows is the same for pods of all namespaces.
func searchList(resolvConf string) []string {
	var list []string
	for line := range strings.Lines(resolvConf) {
		if words := strings.Fields(line); len(words) > 0 && words[0] == "search" {
			list = words[1:] // the last one counts
		}
	}
	if len(list) < 3 {
		return nil
	}
	domain := strings.TrimSuffix(list[2], ".")
	if strings.TrimSuffix(list[1], ".") != "svc."+domain || !strings.HasSuffix(strings.TrimSuffix(list[0], "."), ".svc."+domain) {
		return nil
	}
	return list[1:]
}

// waitForAddresses waits until the node has the first of the addresses, and returns those that it has then. The agent
// gives them to the node, the first one last.
func waitForAddresses(ctx context.Context, wanted []netip.Addr) ([]netip.Addr, error) {
	told := false
	for {
		have, err := net.InterfaceAddrs()
		if err != nil {
			return nil, fmt.Errorf("look for the node's addresses: %w", err)
		}
		present := slices.DeleteFunc(slices.Clone(wanted), func(a netip.Addr) bool {
			return !slices.ContainsFunc(have, func(h net.Addr) bool {
				p, err := netip.ParsePrefix(h.String())
				return err == nil && p.Addr() == a
			})
		})
		if slices.Contains(present, wanted[0]) {
			return present, nil
		}
		if !told {
			told = true
			fmt.Fprintf(os.Stderr, "fathom-dns: waiting for the agent to give the node the address %s (setting dns: node-cache)\n", wanted[0])
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
