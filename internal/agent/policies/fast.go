package policies

import (
	"errors"
	"net/netip"
	"time"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/conntrack"
)

// FastPath is what the fast path knows of policies: fastpath.Policies.
type FastPath interface {
	Set(policy.Facts) (diff.Count, error)
	Change(policy.Facts) error
	Off() error
	Keep(bool) error
	Holds() (bool, error)
	LeftOut() int
	Check(policy.Facts) ([]bpf.Difference, error)
	Flows() ([]fastpath.Flow, error)
	Forget([]fastpath.Flow) error
}

// fastState is what is known of the fast path. Its zero value is a node without one.
type fastState struct {
	path FastPath
	told bool
	// holds says that it holds what the table does. settled says that it does, or that it asks no policies and leaves isolated pods to the stack.
	holds, settled bool
	flows          int // how many it had when they were looked at last
	// unneeded are the flows that were of free pods alone at that time.
	unneeded map[conntrack.Tuple]bool
	looked   time.Time
}

func (s fastState) isSettled() bool { return s.path == nil || s.settled }

// SetFastPath tells of the node's fast path, nil if there is none. Until its maps follow, Free is not known. It does not wait.
func (k *Keeper) SetFastPath(f FastPath) {
	k.mu.Lock()
	same := k.fast.told && k.fast.path == f
	if !same {
		k.fast = fastState{path: f, told: true}
	}
	k.mu.Unlock()
	if !same {
		k.kick.Set()
		k.recheck.Set()
	}
}

// followFast has the fast path hold what the table holds by now, all of it or what has changed. The table comes first, for it has what the fast path does
// not allow. If that fails, the fast path leaves isolated pods to the stack, and it is tried again.
func (k *Keeper) followFast(facts, changes policy.Facts, whole bool) (err error) {
	k.mu.Lock()
	fast := k.fast
	k.mu.Unlock()
	switch {
	case fast.path == nil:
		return nil
	case whole || !fast.holds:
		_, err = fast.path.Set(facts)
	case len(changes.Addrs)+len(changes.Classes) > 0:
		err = fast.path.Change(changes)
	}
	holds, settled := err == nil, true
	if err != nil {
		if off := fast.path.Off(); off != nil {
			err, settled = errors.Join(err, off), false
		} else {
			k.Log.Warn("policies: pods that they isolate are left to the kernel's stack", "error", err)
			err = nil
			time.AfterFunc(retry, k.kick.Set)
		}
	}
	k.mu.Lock()
	turned := k.fast.path == fast.path && k.fast.settled != settled
	if k.fast.path == fast.path {
		k.fast.holds, k.fast.settled = holds, settled
	}
	k.mu.Unlock()
	if turned {
		k.Changed()
	}
	return err
}

// lookAtFlows looks at the connections that the fast path has judged. It returns those that connection tracking is to know instead: policies do not allow
// them any more, or only by what the fast path does not hold. And it brings a list of connections that connection tracking is to know up to that: without
// those that the fast path has judged, with those that it hands over.
func (k *Keeper) lookAtFlows(fast FastPath, marks bool, list []conntrack.Tuple) (handed []fastpath.Flow, all []conntrack.Tuple, err error) {
	flows, err := fast.Flows()
	if err != nil {
		return nil, nil, err
	}
	k.mu.Lock()
	before, again := k.fast.unneeded, time.Since(k.fast.looked) > leaving
	k.mu.Unlock()
	if !again {
		before = nil
	}
	kept, unneeded := map[conntrack.Tuple]fastpath.Flow{}, map[conntrack.Tuple]bool{}
	var forget []fastpath.Flow
	stale := false
	for _, f := range flows {
		switch stays, needed := k.keepsFlow(f); {
		// Of a free pod nothing is to be remembered: when it is isolated again, the same ends may have another connection, begun by the other one.
		// What it had when it became free goes later, so that no packet finds it gone before the pod is free.
		case !needed && before[f.Tuple], f.Ended:
			forget = append(forget, f)
		case !needed:
			unneeded[f.Tuple] = true
		case marks && (!stays || f.Refused):
			handed = append(handed, f)
		default:
			kept[f.Tuple], stale = f, stale || f.Stale
		}
	}
	if stale && fast.LeftOut() > 0 { // some of them may be refused by their next packet
		time.AfterFunc(leaving/2, k.recheck.Set)
	}
	for _, t := range list {
		if _, judged := kept[t]; judged {
			continue
		}
		if f, turned := kept[conntrack.Tuple{Source: t.Destination, Destination: t.Source}]; turned { // one that has ended, with the same ends
			handed = append(handed, f)
		}
		all = append(all, t)
	}
	for _, f := range handed {
		if t := f.Tuple; kept[t] == (fastpath.Flow{}) {
			all = append(all, t)
		}
	}
	k.mu.Lock()
	if k.fast.path == fast {
		if k.fast.flows = len(flows) - len(forget); again {
			k.fast.unneeded, k.fast.looked = unneeded, time.Now()
		}
	}
	k.mu.Unlock()
	return handed, all, fast.Forget(forget)
}

// keepsFlow says whether a connection that may not have been judged by what policies are now can stay where it is: they allow it, and the fast path has what
// they say; and whether they isolate any of its pods.
func (k *Keeper) keepsFlow(f fastpath.Flow) (stays, needed bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	stays = true
	for _, a := range []netip.Addr{f.Source.Addr(), f.Destination.Addr()} {
		if is, own := k.held[a]; own {
			needed = needed || k.on && !is.Free()
			stays = stays && fastpath.Judges(is)
		}
	}
	if stays && needed && f.Stale {
		stays = k.allows(policy.Packet{From: f.Source.Addr(), To: f.Destination.Addr(), Protocol: service.TCP, Port: f.Destination.Port()})
	}
	return stays, needed
}

// allows says whether policies allow a connection. The lock is held.
func (k *Keeper) allows(p policy.Packet) bool {
	return k.facts.Judge(policy.Egress, p).Allowed && k.facts.Judge(policy.Ingress, p).Allowed
}
