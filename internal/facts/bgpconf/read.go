package bgpconf

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"net/netip"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/netconf"
)

// Problem is why a BGPPeer is not applied on this node, or only in part.
type Problem struct {
	Peer string
	Text string
	// Refused says that there is no session because of it.
	Refused bool
	// Waits says that there is no session yet because no router was heard.
	Waits bool
}

func (p Problem) String() string { return fmt.Sprintf("BGPPeer %s: %s", p.Peer, p.Text) }

// Secrets returns a Secret's data, of the namespace fathom-system.
type Secrets func(name string) (map[string][]byte, error)

// Read computes a node's announcements. An error in one peer does not affect the others. Of two peers with the same address
// the older counts.
func Read(peers []*v1alpha1.BGPPeer, node Node, secrets Secrets) (Speaker, []Problem) {
	s := Speaker{RouterID: RouterID(node.Name, node.Addrs)}
	var problems []Problem
	sorted := slices.SortedFunc(slices.Values(peers), func(a, b *v1alpha1.BGPPeer) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
	})
	named := map[netip.AddrPort]string{}
	for _, p := range sorted {
		selected, err := Selects(p, node.Labels)
		r := reader{peer: p, node: node}
		switch {
		case p.DeletionTimestamp != nil: // something waits for it to be over
		case err != nil:
			r.refuse("nodeSelector: %v", err)
		case selected:
			peer := r.read(secrets)
			if older := named[peer.Address]; older != "" && !r.refused {
				r.refuse("%s is BGPPeer %s already, which is older", peer.Address, older)
			}
			if !r.refused {
				named[peer.Address] = p.Name
				s.Peers = append(s.Peers, peer)
			}
		}
		problems = append(problems, r.problems...)
	}
	slices.SortFunc(s.Peers, func(a, b Peer) int { return cmp.Compare(a.Name, b.Name) })
	return s, problems
}

// Selects reports whether a peer selects a node with these labels.
func Selects(p *v1alpha1.BGPPeer, nodeLabels map[string]string) (bool, error) {
	if p.Spec.NodeSelector == nil {
		return true, nil
	}
	selector, err := metav1.LabelSelectorAsSelector(p.Spec.NodeSelector)
	if err != nil {
		return false, err
	}
	return selector.Matches(labels.Set(nodeLabels)), nil
}

// RouterID returns a node's BGP identifier: its first IPv4 address or, if it has none, one derived from its name. It has to
// differ among a router's peers, and to stay the same after a restart.
func RouterID(node string, addrs []netip.Addr) netip.Addr {
	for _, a := range addrs {
		if a.Is4() {
			return a
		}
	}
	sum := sha256.Sum256([]byte("bgp router id\x00" + node))
	// 240.0.0.0/4 is unassigned, so it is not the address of a router.
	return netip.AddrFrom4([4]byte{0xf0 | sum[0]&0x0f, sum[1], sum[2], sum[3]})
}

// reader reads one BGPPeer. The API server has validated most of it, unless the CRD is older or was changed by hand.
type reader struct {
	peer     *v1alpha1.BGPPeer
	node     Node
	problems []Problem
	refused  bool
}

func (r *reader) refuse(format string, args ...any) {
	r.problems = append(r.problems, Problem{r.peer.Name, fmt.Sprintf(format, args...), true, false})
	r.refused = true
}

func (r *reader) wait(format string, args ...any) {
	r.problems = append(r.problems, Problem{r.peer.Name, fmt.Sprintf(format, args...), true, true})
	r.refused = true
}

func (r *reader) lack(format string, args ...any) {
	r.problems = append(r.problems, Problem{r.peer.Name, fmt.Sprintf(format, args...), false, false})
}

func (r *reader) read(secrets Secrets) Peer {
	spec := r.peer.Spec
	p := Peer{
		Name: r.peer.Name, ASN: r.asn("peerASN", spec.PeerASN), LocalASN: r.asn("localASN", spec.LocalASN),
		HoldTime:  time.Duration(cmp.Or(spec.HoldTimeSeconds, int32(DefaultHoldTime/time.Second))) * time.Second,
		Keepalive: time.Duration(spec.KeepaliveTimeSeconds) * time.Second,
		Hops:      1,
	}
	p.Address = r.address()
	p.Unnumbered = spec.PeerAddress == ""
	if p.HoldTime < 3*time.Second || p.HoldTime > 65535*time.Second {
		r.refuse("holdTimeSeconds %d: want 3 to 65535", spec.HoldTimeSeconds)
	}
	p.Keepalive = cmp.Or(p.Keepalive, min(DefaultKeepalive, p.HoldTime/3)).Truncate(time.Second)
	if p.Keepalive < time.Second || p.Keepalive >= p.HoldTime {
		r.refuse("keepaliveTimeSeconds %d: want less than the hold time, %v", spec.KeepaliveTimeSeconds, p.HoldTime)
	}
	if spec.EBGPMultihop < 0 || spec.EBGPMultihop > 255 {
		r.refuse("ebgpMultihop %d: want 1 to 255", spec.EBGPMultihop)
	} else if spec.EBGPMultihop > 0 {
		p.Hops = uint8(spec.EBGPMultihop)
	}
	p.TTLSecurity = spec.TTLSecurity
	p.RestartTime = r.restartTime()
	p.Password = r.password(secrets)
	p.Routes = r.routes(p)
	return p
}

// asn parses an AS number. RFC 7607, 7300 and 6793 reserve some.
func (r *reader) asn(field string, n int64) uint32 {
	switch {
	case n < 1 || n >= 1<<32-1, n == 65535, n == 23456:
		r.refuse("%s %d: want a number from 1 to 4294967294, other than 23456 and 65535", field, n)
		return 0
	}
	return uint32(n)
}

func (r *reader) address() netip.AddrPort {
	spec := r.peer.Spec
	a, err := netip.ParseAddr(spec.PeerAddress)
	port := cmp.Or(spec.PeerPort, DefaultPort)
	switch {
	case spec.PeerAddress == "" && spec.Interface != "":
		a = r.heard(spec.Interface)
	case err != nil:
		r.refuse("peerAddress %q is no address", spec.PeerAddress)
	case a.Is6() && a.Zone() == "" && a.IsLinkLocalUnicast() && spec.Interface != "":
		a = a.WithZone(spec.Interface)
	case spec.Interface != "":
		r.refuse("interface is for a link-local peerAddress such as fe80::1, and %s is none", a)
	case a.Is6() && a.IsLinkLocalUnicast():
		r.refuse("peerAddress %s is link-local: say by interface on which of the node's devices it is", a)
	case a.Is4In6(), a.Zone() != "", a.IsUnspecified(), a.IsMulticast(), a.IsLinkLocalUnicast(), a.IsLoopback():
		r.refuse("peerAddress %s: want a plain unicast address", a)
	case slices.Contains(r.node.Addrs, a):
		r.refuse("peerAddress %s is this node's own", a)
	case !slices.ContainsFunc(r.node.Addrs, func(own netip.Addr) bool { return own.Is4() == a.Is4() }):
		r.refuse("peerAddress %s: this node has no address of that family", a)
	}
	if port < 1 || port > 65535 {
		r.refuse("peerPort %d: want 1 to 65535", port)
	}
	return netip.AddrPortFrom(a, uint16(port))
}

// heard returns the address of the router at the other end of a link.
func (r *reader) heard(device string) netip.Addr {
	h := r.node.Heard[device]
	switch {
	case h.Problem != "" && !h.Router.IsValid():
		r.refuse("interface %s: %s", device, h.Problem)
	case !h.Router.IsValid():
		r.wait("no router advertisement was heard on %s: does the router send them there, and is that the link to it? Else name its peerAddress", device)
	case h.Problem != "":
		r.lack("interface %s: the router is not told of this node: %s", device, h.Problem)
	case h.Other.IsValid():
		r.lack("interface %s: there are several routers, of which %s is spoken with, and %s is not: name them by peerAddress", device, h.Router, h.Other)
	}
	return h.Router.WithZone(device)
}

// Interfaces returns the devices on which a node has to find the router by itself.
func Interfaces(peers []*v1alpha1.BGPPeer, nodeLabels map[string]string) []string {
	var devices []string
	for _, p := range peers {
		selected, err := Selects(p, nodeLabels)
		if err == nil && selected && p.DeletionTimestamp == nil && p.Spec.PeerAddress == "" && p.Spec.Interface != "" {
			devices = append(devices, p.Spec.Interface)
		}
	}
	slices.Sort(devices)
	return slices.Compact(devices)
}

func (r *reader) restartTime() time.Duration {
	g := r.peer.Spec.GracefulRestart
	switch {
	case g == nil:
		return DefaultRestartTime
	case g.Enabled != nil && !*g.Enabled:
		return 0
	case g.RestartTimeSeconds < 0 || g.RestartTimeSeconds > 4095:
		r.refuse("gracefulRestart.restartTimeSeconds %d: want 1 to 4095", g.RestartTimeSeconds)
	}
	return cmp.Or(time.Duration(g.RestartTimeSeconds)*time.Second, DefaultRestartTime)
}

// maxPassword is TCP_MD5SIG_MAXKEYLEN.
const maxPassword = 80

// password reads the peer's password. Without it there is no session, rather than an unsigned one.
func (r *reader) password(secrets Secrets) Password {
	ref := r.peer.Spec.PasswordSecret
	if ref == nil {
		return ""
	}
	name, key := cmp.Or(ref.Name, DefaultSecret), cmp.Or(ref.Key, "password")
	data, err := secrets(name)
	value, found := data[key]
	switch {
	case apierrors.IsForbidden(err):
		r.refuse("passwordSecret: %s", forbidden(name))
	case err != nil:
		r.refuse("passwordSecret: %v", err)
	case !found:
		r.refuse("passwordSecret: Secret %s has no key %s", name, key)
	case len(value) == 0 || len(value) > maxPassword:
		r.refuse("passwordSecret: key %s of Secret %s has %d bytes, want 1 to %d", key, name, len(value), maxPassword)
	}
	return Password(value)
}

// forbidden says what to do about a Secret that agents may not read. RBAC grants names, and cannot follow what BGPPeers
// name: a right to read any Secret of a namespace would include tokens.
func forbidden(secret string) string {
	const namespace, account = netconf.Namespace, "fathom-agent"
	return fmt.Sprintf("agents may not read Secret %[1]s of namespace %[2]s, of which they read %[3]s alone. Keep the password in a key of %[3]s, or let them: "+
		"kubectl -n %[2]s create role bgp-%[1]s --verb=get --resource=secrets --resource-name=%[1]s && "+
		"kubectl -n %[2]s create rolebinding bgp-%[1]s --role=bgp-%[1]s --serviceaccount=%[2]s:%[4]s", secret, namespace, DefaultSecret, account)
}

// SessionOf returns a node's entry in the status of a BGPPeer, or nil.
func SessionOf(p *v1alpha1.BGPPeer, node string) *v1alpha1.BGPSession {
	for i := range p.Status.Sessions {
		if p.Status.Sessions[i].Node == node {
			return &p.Status.Sessions[i]
		}
	}
	return nil
}
