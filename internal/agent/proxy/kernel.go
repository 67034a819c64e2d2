package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/bpf/connect"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
)

// kernel holds both ways in which the kernel balances. Its zero value, with paths, is not open yet.
type kernel struct {
	paths    Paths
	loopback Loopback // may be nil
	log      *slog.Logger
	rules    *ruleset.Ruleset
	connect  *connect.Translator
	// missing is why nothing is balanced at connect(); empty if connect() balances.
	missing string
	// untracked holds the addresses that are exempt from connection tracking; nil if unknown.
	untracked []netip.Addr
	// failed is true if the last attempt failed, so that the kernel's contents are uncertain.
	failed bool
}

// set makes the kernel hold the plan, whatever it held before, and returns the number of entries it changed. plain is the
// plan without redirection, see change. caches are the addresses to which redirection may lead.
func (k *kernel) set(mode netconf.ServiceProxy, plan, plain service.Plan, caches []netip.Addr) (changed int, err error) {
	if err := k.open(mode); err != nil {
		return 0, err
	}
	if k.connect == nil {
		plain = plan
	}
	byRules := func() error {
		count, err := k.rules.SetServices(plain)
		changed += count.Added + count.Removed + count.Corrected
		return err
	}
	if k.connect == nil {
		if err := byRules(); err != nil {
			return 0, err
		}
		// Packets to the caches are translated, so they have to be tracked.
		err := k.setUntracked(nil, &changed)
		return changed, errors.Join(err, k.routeLoopback(true))
	}
	// nftables goes first: it alone answers at all addresses, and must never lack a Service that connect() has. Each of the
	// two takes a second at 50,000 Services, so connect() writes concurrently what sockets cannot reach yet.
	ended := make(chan error, 1)
	go func() { ended <- byRules() }()
	done := sync.OnceValue(func() error {
		if err := <-ended; err != nil {
			return err
		}
		return k.setUntracked(caches, &changed)
	})
	n, err := k.connect.SetAfter(plan, done)
	if err := done(); err != nil {
		return changed, err
	}
	if err != nil {
		return changed, fmt.Errorf("balance at connect(): %w", err)
	}
	return changed + n, k.routeLoopback(false)
}

func (k *kernel) routeLoopback(on bool) error {
	if k.loopback == nil {
		return nil
	}
	return k.loopback.Route(on)
}

func (k *kernel) setUntracked(caches []netip.Addr, changed *int) error {
	if len(caches) == 0 && k.untracked != nil && len(k.untracked) == 0 {
		return nil // an empty transaction would still cost one
	}
	count, err := k.rules.SetUntracked(caches)
	if err != nil {
		return err
	}
	*changed += count.Added + count.Removed + count.Corrected
	k.untracked = append([]netip.Addr{}, caches...)
	return nil
}

// holds reports whether the kernel holds what set and change left there. change may run concurrently; set, open, remove and
// close wait for it.
func (k *kernel) holds(ctx context.Context) (bool, error) {
	same, err := k.rules.HoldsServices(ctx)
	if err == nil && same && len(k.untracked) > 0 {
		same, err = k.rules.HoldsUntracked(k.untracked)
	}
	switch {
	case err != nil || !same:
	case k.connect != nil:
		same, err = k.connect.Holds(ctx)
	case k.loopback != nil:
		same, err = k.loopback.Routed()
	}
	return same, err
}

// change applies what has changed since. plain are the changes without redirection. nftables gets them, so the few
// connections that connect() does not balance go to the DNS Service's own endpoints. Therefore packets to and from the
// node's DNS cache are never translated and need not be tracked.
func (k *kernel) change(changes, plain []service.Change) error {
	// connect() goes first: most connections are those of the node's own pods.
	if k.connect != nil {
		if err := k.connect.Change(changes); err != nil {
			return fmt.Errorf("balance at connect(): %w", err)
		}
	}
	if k.connect == nil {
		plain = changes
	}
	return k.rules.ChangeServices(plain)
}

// open opens what is not open yet, and removes what the mode does not use.
func (k *kernel) open(mode netconf.ServiceProxy) error {
	var err error
	if k.rules == nil {
		if k.rules, err = ruleset.Open(link.OwnNetNS); err != nil {
			return err
		}
	}
	if mode == netconf.ProxyNFTables {
		if k.connect != nil {
			k.connect.Close()
			k.connect = nil
		}
		k.missing = ""
		return connect.Remove(k.paths.BPF)
	}
	if k.connect != nil {
		return nil
	}
	cgroup, err := cgroup2(k.paths.Cgroup)
	if err == nil {
		k.connect, err = connect.Open(connect.Options{Dir: k.paths.BPF, Cgroup: cgroup})
	}
	var unsupported *bpf.UnsupportedError
	if errors.As(err, &unsupported) || errors.Is(err, errNoCgroup2) {
		if k.missing != err.Error() {
			k.log.Info("nftables balances everything", "because", err)
		}
		k.missing = err.Error()
		return nil
	}
	if err == nil {
		k.missing = ""
	}
	return err
}

// remove takes what set wrote out of the kernel.
func (k *kernel) remove() error {
	var err error
	if k.rules == nil {
		if k.rules, err = ruleset.Open(link.OwnNetNS); err != nil {
			return err
		}
	}
	k.untracked = nil
	if k.connect != nil {
		k.connect.Close()
		k.connect = nil
	}
	if err := k.routeLoopback(false); err != nil {
		return err // loopback addresses stay routed only while the table guards them
	}
	return errors.Join(connect.Remove(k.paths.BPF), k.rules.DeleteServices(), k.rules.Delete(ruleset.DNSTable))
}

func (k *kernel) close() {
	if k.rules != nil {
		k.rules.Close()
		k.rules = nil
	}
	if k.connect != nil {
		k.connect.Close()
		k.connect = nil
	}
}

var errNoCgroup2 = errors.New("there is no cgroup v2 file system")

// cgroup2 returns the mount point of cgroup v2 below the directory where cgroups are mounted: the directory itself, or a
// directory in it on a machine with v1 controllers.
func cgroup2(dir string) (string, error) {
	for _, path := range []string{dir, filepath.Join(dir, "unified")} {
		var s unix.Statfs_t
		if err := unix.Statfs(path, &s); err == nil && s.Type == unix.CGROUP2_SUPER_MAGIC {
			return path, nil
		}
	}
	return "", fmt.Errorf("%w at %s", errNoCgroup2, dir)
}
