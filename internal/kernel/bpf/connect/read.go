package connect

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
)

// Frontends reads the frontends that the kernel holds, sorted by key. If a set lacks endpoints, the frontend has the others.
func (t *Translator) Frontends() ([]service.Balanced, error) {
	s, err := t.read()
	if err != nil {
		return nil, err
	}
	all := make([]service.Balanced, 0, len(s.services))
	for k, v := range s.services {
		b := service.Balanced{Key: k.key(), ID: v.ID, Affinity: time.Duration(v.Affinity) * time.Second, PodsOnly: v.PodsOnly != 0}
		if set, there := s.sets[v.Set]; there && v.Count > 0 {
			b.Endpoints = endpointsIn(set.content)
			b.Endpoints = b.Endpoints[:min(len(b.Endpoints), int(v.Count))]
		}
		all = append(all, b)
	}
	slices.SortFunc(all, func(a, b service.Balanced) int { return a.Compare(b.Key) })
	return all, nil
}

// Translation is a socket whose process connected to a Service, and which is connected to an endpoint.
type Translation struct {
	Cookie            uint64 // of the socket, as sock_diag reports it
	Protocol          service.Protocol
	Frontend, Backend netip.AddrPort
}

func (v peerValue) translation(cookie uint64) Translation {
	as := v.As.key()
	return Translation{Cookie: cookie, Protocol: as.Protocol, Frontend: netip.AddrPortFrom(as.Addr, as.Port), Backend: v.To.addrPort()}
}

// Translations lists the translated sockets. A socket whose connection failed may be among them until it is closed.
func (t *Translator) Translations() ([]Translation, error) {
	var all []Translation
	if err := readAll(t.objects.FathomPeers, func(cookie uint64, v peerValue) { all = append(all, v.translation(cookie)) }); err != nil {
		return nil, fmt.Errorf("read the map %s: %w", pin.Peers, err)
	}
	return all, nil
}

// Translated returns the translation of a socket, if it has one. If the socket is connected to another address than Backend,
// it has connected again since.
func (t *Translator) Translated(cookie uint64) (Translation, bool, error) {
	var v peerValue
	err := t.objects.FathomPeers.Lookup(cookie, &v)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return Translation{}, false, nil
	}
	if err != nil {
		return Translation{}, false, fmt.Errorf("read the map %s: %w", pin.Peers, err)
	}
	return v.translation(cookie), true, nil
}

// Limits of how many connected sockets are recorded. Sockets beyond them are balanced by nftables.
const (
	MaxPeers    = 131072 // on the node
	ClientShare = 16384  // of one network namespace, PEERS_OF_ONE in connect.c
)

// Crowded returns the cookies of the network namespaces that have used up their share of connected sockets, sorted.
func (t *Translator) Crowded() ([]uint64, error) {
	var all []uint64
	if err := readAll(t.objects.FathomClients, func(netns uint64, sockets int64) {
		if sockets >= ClientShare {
			all = append(all, netns)
		}
	}); err != nil {
		return nil, fmt.Errorf("read the map %s: %w", pin.Clients, err)
	}
	slices.Sort(all)
	return all, nil
}

// fates are the outcomes of a socket's attempt to reach a Service, in the order of `enum fate` in connect.c.
var fates = []string{"", "connected", "sent", "refused", "changing", FateFull, "share", "socket", "kernel"}

// FateFull is the fate of sockets for which the map of peers had no room.
const FateFull = "full"

// Fate counts one outcome of sockets' attempts to reach a Service.
type Fate struct {
	Name  string
	Times uint64
}

// Fates reads how often each outcome occurred since the maps were made.
func (t *Translator) Fates() ([]Fate, error) {
	var all []Fate
	for i, name := range fates {
		if name == "" {
			continue
		}
		var cpus []uint64
		if err := t.objects.FathomConnects.Lookup(uint32(i), &cpus); err != nil {
			return nil, fmt.Errorf("read the map %s: %w", pin.Connects, err)
		}
		f := Fate{Name: name}
		for _, n := range cpus {
			f.Times += n
		}
		all = append(all, f)
	}
	return all, nil
}

// Detached returns the names of the programs that are not attached to the cgroup in this version.
func (t *Translator) Detached() ([]string, error) {
	attached, err := t.attached()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, h := range hooks {
		if attached[h.name] != thisVersion {
			names = append(names, h.name)
		}
	}
	return names, nil
}

// Check returns how the kernel differs from the plan, and changes nothing.
func (t *Translator) Check(p service.Plan) ([]bpf.Difference, error) {
	have, err := t.Frontends()
	if err != nil {
		return nil, err
	}
	text := func(all []service.Balanced) map[service.Key]string {
		m := make(map[service.Key]string, len(all))
		for _, b := range all {
			m[b.Key] = fmt.Sprintf("endpoints %v, affinity %v, id %d, for pods only %t", b.Endpoints, b.Affinity, b.ID, b.PodsOnly)
		}
		return m
	}
	d := bpf.Compare(text(service.BalancedOf(p)), text(have), func(k service.Key) string { return "frontend " + k.String() }, func(s string) string { return s })
	attached, err := t.attached()
	if err != nil {
		return nil, err
	}
	want := map[string]string{}
	for _, h := range hooks {
		want[h.name] = thisVersion
	}
	return append(d, bpf.Compare(want, attached, func(name string) string { return "program " + name + " of " + t.Cgroup }, func(s string) string { return s })...), nil
}
