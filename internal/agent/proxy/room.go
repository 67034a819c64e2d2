package proxy

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fathom-network/fathom/internal/kernel/bpf/connect"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
)

const (
	// lookForRoom is how often the proxy checks whether the kernel has run out of room for clients, and tellOfRoom how long
	// it reports that after it was last seen: the condition may come and go with each connection.
	lookForRoom = 10 * time.Second
	tellOfRoom  = 2 * time.Minute
)

// room records shortages of the kernel's room for clients of Services. Its zero value has seen none.
type room struct {
	looked time.Time
	full   uint64               // the kernel's count of sockets that could not be noted, at the last check
	known  bool                 // whether full is known
	seen   map[string]time.Time // problem to when it was last seen
}

// problem returns the shortages to report at the given time; empty if there are none.
func (r *room) problem(now time.Time) string {
	maps.DeleteFunc(r.seen, func(_ string, seen time.Time) bool { return now.Sub(seen) > tellOfRoom })
	return strings.Join(slices.Sorted(maps.Keys(r.seen)), "; ")
}

func (r *room) saw(now time.Time, format string, args ...any) {
	if r.seen == nil {
		r.seen = map[string]time.Time{}
	}
	r.seen[fmt.Sprintf(format, args...)] = now
}

// lookForRoom checks for shortages, unless it did so recently. What cannot be read now is read the next time.
func (p *Proxy) lookForRoom(now time.Time) error {
	r := &p.room
	if now.Sub(r.looked) < lookForRoom {
		return nil
	}
	r.looked = now
	if c := p.kernel.connect; c != nil {
		fates, err := c.Fates()
		if err != nil {
			return err
		}
		for _, f := range fates {
			if f.Name == connect.FateFull {
				if r.known && f.Times > r.full {
					r.saw(now, "new connections are balanced by nftables alone: %d sockets are connected to Services, which is as many as are noted", connect.MaxPeers)
				}
				r.full, r.known = f.Times, true
			}
		}
		crowded, err := c.Crowded()
		if err != nil {
			return err
		}
		names := p.namespacesOf(crowded)
		for _, cookie := range crowded {
			r.saw(now, "new connections from %s are balanced by nftables alone: it has %d sockets that are connected to Services, which is its share", names[cookie], connect.ClientShare)
		}
	}
	full, err := p.kernel.rules.AffinityFull()
	if err != nil {
		return err
	}
	if len(full) > 0 {
		of := ""
		if names := p.inbox.named(full); len(names) > 0 {
			of = " of Service " + names[0].String()
		}
		if len(full) > 1 {
			of += " and others"
		}
		r.saw(now, "new clients%s do not stay with an endpoint: %d are remembered by sessionAffinity, for which there is room", of, ruleset.ClientsRemembered)
	}
	p.counts.forgetful.Set(float64(len(full)))
	return nil
}

// namespacesOf names the network namespaces with these cookies.
func (p *Proxy) namespacesOf(cookies []uint64) map[uint64]string {
	names := make(map[uint64]string, len(cookies))
	if len(cookies) == 0 {
		return names
	}
	for _, c := range cookies {
		names[c] = fmt.Sprintf("a network namespace (cookie %d)", c)
	}
	paths, err := p.reaper.namespaces()
	if err != nil {
		return names
	}
	for _, path := range paths {
		n, err := link.Open(path)
		if err != nil { // gone by now
			continue
		}
		cookie, err := connect.NetnsCookie(n)
		n.Close()
		if _, asked := names[cookie]; err != nil || !asked {
			continue
		}
		names[cookie] = "the network namespace " + filepath.Base(path)
		if path == link.OwnNetNS {
			names[cookie] = "the node's own network namespace"
		}
	}
	return names
}
