package main

import (
	"context"
	"strings"
	"time"

	"github.com/fathom-network/fathom/kit/addons/dns/corefile"
)

// corefileInterval is how often the servers' configuration is looked at. When somebody changes it, kubelet takes up to a
// minute and a half until it is here, and in the servers' pods, which look each half a minute (CoreDNS's reload).
const corefileInterval = 2 * time.Second

// errAside says why the cache stops to answer.
type errAside string

func (e errAside) Error() string { return string(e) }

// personal says why pods have to ask the cluster's servers themselves, or nothing: what those answer depends on who
// asks, or it cannot be known whether it does.
func (o options) personal() string {
	if o.Corefile == "" {
		return ""
	}
	found, err := corefile.Find(o.Corefile)
	if err != nil {
		return err.Error()
	}
	var all []string
	for _, d := range found {
		all = append(all, d.String())
	}
	return strings.Join(all, "; ")
}

// until looks at the servers' configuration until what personal says is as wanted, or the context ends: then it says so.
func (o options) until(ctx context.Context, wanted func(string) bool) bool {
	tick := time.NewTicker(corefileInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
			if wanted(o.personal()) {
				return true
			}
		}
	}
}
