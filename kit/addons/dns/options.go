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

	"github.com/miekg/dns"
)

// options are what the Corefile is made of.
type options struct {
	Listen          []netip.Addr
	Port            int
	Upstream        string
	Search          []string // a pod's, without the domain of its namespace
	Health, Metrics string
	Corefile        string // of the cluster's servers, or nothing if it does not matter
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
	// Who listens for scrapes is not prometheus, which only counts, but serve.
	fmt.Fprintf(&b, "\tchaos fathom-dns\n\tprometheus\n\tloadbalance\n")
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

// maxSearch is how many domains Kubernetes allows in a search list (KEP-2595). Each is a question more when a name does
// not exist.
const maxSearch = 32

// searchList reads the search list of a pod's resolv.conf, which begins with NAMESPACE.svc.DOMAIN; one that does not is
// nobody's whom we answer, and of no use. What follows is the same for pods of all namespaces. Words that are no names
// of hosts are left out: the list becomes part of a Corefile, where a brace or a quote means something else.
func searchList(resolvConf string) []string {
	var list []string
	for line := range strings.Lines(resolvConf) {
		if words := strings.Fields(line); len(words) > 0 && words[0] == "search" {
			list = words[1:] // the last one counts
		}
	}
	list = slices.DeleteFunc(list, func(name string) bool { return !isHostName(name) })
	if len(list) < 3 {
		return nil
	}
	domain := strings.TrimSuffix(list[2], ".")
	if strings.TrimSuffix(list[1], ".") != "svc."+domain || !strings.HasSuffix(strings.TrimSuffix(list[0], "."), ".svc."+domain) {
		return nil
	}
	return list[1:min(len(list), maxSearch)]
}

// isHostName says whether a search list may have the name: letters, digits, hyphens, and the underscores that Kubernetes
// allows there (RelaxedDNSSearchValidation).
func isHostName(name string) bool {
	_, ok := dns.IsDomainName(name)
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."
	return ok && name != "." && strings.Trim(name, letters) == ""
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
