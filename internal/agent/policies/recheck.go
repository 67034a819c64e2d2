package policies

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/conntrack"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
)

// Flows are the connections that the node's kernel knows: conntrack.Table.
type Flows interface {
	SetMark(ctx context.Context, bits uint32, marked func(conntrack.Entry) bool) (set, cleared int, err error)
	Adopt(ctx context.Context, list []conntrack.Tuple) (adopted int, err error)
	Entries(ctx context.Context, f conntrack.Filter, each func(conntrack.Entry) error) error
	Close()
}

func openFlows() (Flows, error) { return conntrack.OpenTable(link.OwnNetNS) }

// SetEstablished says what becomes of connections that policies forbid after they began. It does not wait.
func (k *Keeper) SetEstablished(e netconf.PolicyEstablished) {
	k.mu.Lock()
	same := k.established == e
	k.established = e
	k.mu.Unlock()
	if !same {
		k.recheck.Set()
	}
}

const (
	// A recheck reads all connections. It may take a tenth of a processor, but is never later than this after a change.
	recheckShare    = 10
	recheckPatience = 500 * time.Millisecond
	// leaving is how long a pod that policies isolate for the first time may need to leave the fast path.
	leaving = 2 * time.Second
)

// runRechecks rechecks established connections until the context ends: after each change in the kernel by which something may be forbidden
// that was allowed, and from time to time. What begins after the change is judged by the kernel's rules, so nothing is missed but what
// was between the rules and connection tracking's table in that moment; the next recheck finds it.
func (k *Keeper) runRechecks(ctx context.Context) {
	resync := time.NewTicker(k.Resync)
	defer resync.Stop()
	var flows Flows
	defer func() {
		if flows != nil {
			flows.Close()
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.recheck:
		case <-resync.C:
		}
		began := time.Now()
		err := k.recheckOnce(ctx, &flows)
		if ctx.Err() != nil {
			return
		}
		took := time.Since(began)
		if err != nil {
			k.Log.Warn("policies: connections that are there are not rechecked", "error", err)
			if flows != nil {
				flows.Close()
				flows = nil
			}
			k.recheck.Set()
			took = retry
		}
		wait := time.NewTimer(max(min(recheckShare*took, recheckPatience), took))
		select {
		case <-ctx.Done():
			wait.Stop()
			return
		case <-wait.C:
		}
	}
}

// recheckOnce marks the connections that policies forbid, and takes the mark from all others.
func (k *Keeper) recheckOnce(ctx context.Context, flows *Flows) (err error) {
	k.mu.Lock()
	// What an agent before this one has marked stays, and connection tracking is told of no connection that the fast path may have judged.
	unknown := !k.known || k.established == "" || !k.fast.told || !k.fast.isSettled()
	marks := k.on && k.established == netconf.PolicyRecheck
	looks := marks || !k.clean
	fresh := k.fresh()
	fast, established := k.fast, k.established
	k.mu.Unlock()
	if unknown {
		return nil
	}
	began, adoptErr := time.Now(), error(nil)
	// Sockets first: of those that begin meanwhile the fast path knows by then.
	var list []conntrack.Tuple
	if len(fresh) > 0 {
		list, adoptErr = k.connectionsOf(ctx, fresh)
		time.AfterFunc(leaving/2, k.recheck.Set)
	}
	var handed []fastpath.Flow
	if fast.path != nil {
		if err := fast.path.Keep(established == netconf.PolicyKeep); err != nil {
			return err
		}
		if handed, list, err = k.lookAtFlows(fast.path, marks, list); err != nil {
			return err
		}
	}
	if !looks && len(list) == 0 {
		return adoptErr
	}
	if *flows == nil {
		if *flows, err = k.open(); err != nil {
			return err
		}
	}
	adopted, err := (*flows).Adopt(ctx, list)
	if err != nil { // packets of those that were to be handed over are dropped for now
		return errors.Join(err, adoptErr)
	}
	if !looks {
		return errors.Join(adoptErr, forgetFlows(fast.path, handed))
	}
	own, err := nodeAddrs()
	if err != nil {
		return errors.Join(err, adoptErr)
	}
	set, cleared, err := (*flows).SetMark(ctx, ruleset.ForbiddenMark, func(e conntrack.Entry) bool {
		return marks && k.forbids(e, own)
	})
	if err == nil { // from here on they are ended by their marks
		err = forgetFlows(fast.path, handed)
	}
	k.metrics.rechecks.Observe(time.Since(began).Seconds())
	k.metrics.ended.Add(float64(set))
	if set+cleared+adopted > 0 {
		k.Log.Info("policies: rechecked connections", "forbidden", set, "allowed again", cleared, "taken off the fast path", adopted)
	}
	k.mu.Lock()
	k.clean = err == nil && !marks
	k.mu.Unlock()
	return errors.Join(err, adoptErr)
}

// forbids says whether policies do not allow a connection. Those of the node itself do not pass the rules, and are always allowed; those that
// another announced, such as FTP's, are allowed by that one.
func (k *Keeper) forbids(e conntrack.Entry, node map[netip.Addr]bool) bool {
	from, to := e.Original.Source.Addr(), e.Reply.Source.Addr()
	if e.Status&conntrack.Expected != 0 || node[from] || node[to] {
		return false
	}
	p := policy.Packet{From: from, To: to, Protocol: e.Protocol, Port: e.Reply.Source.Port()}
	k.mu.Lock()
	defer k.mu.Unlock()
	return !k.allows(p)
}

func forgetFlows(fast FastPath, list []fastpath.Flow) error {
	if len(list) == 0 {
		return nil
	}
	return fast.Forget(list)
}

// fresh returns the addresses of the pods that policies have just begun to isolate.
func (k *Keeper) fresh() map[netip.Addr]bool {
	all := map[netip.Addr]bool{}
	for a, since := range k.isolatedSince {
		if time.Since(since) > leaving {
			delete(k.isolatedSince, a)
		} else {
			all[a] = true
		}
	}
	return all
}

// connectionsOf returns the connections of pods that come from the fast path, as their clients began them. Connection tracking is to know them: what it does
// not know, it would take for begun by whoever sends next, and judge it so.
func (k *Keeper) connectionsOf(ctx context.Context, pods map[netip.Addr]bool) (list []conntrack.Tuple, err error) {
	names, err := os.ReadDir(k.NetNS)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var errs []error
	for _, name := range names {
		path := filepath.Join(k.NetNS, name.Name())
		if !link.IsNamespace(path) { // a file that somebody left there, such as a reboot
			continue
		}
		err := connections(ctx, path, func(t conntrack.Tuple) error {
			if pods[t.Source.Addr()] || pods[t.Destination.Addr()] {
				list = append(list, t)
			}
			return nil
		})
		if err != nil && !errors.Is(err, os.ErrNotExist) && !conntrack.IsUnsupported(err) { // a pod that is gone took its sockets along
			errs = append(errs, err)
		}
	}
	return list, errors.Join(errs...)
}

func connections(ctx context.Context, path string, each func(conntrack.Tuple) error) error {
	sockets, err := conntrack.OpenSockets(path)
	if err != nil {
		return err
	}
	defer sockets.Close()
	return sockets.Connections(ctx, each)
}

// nodeAddrs are the addresses of the node's devices.
func nodeAddrs() (map[netip.Addr]bool, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	all := map[netip.Addr]bool{}
	for _, a := range list {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			all[p.Addr()] = true
		}
	}
	return all, nil
}
