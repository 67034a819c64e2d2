package fastpath_test

import (
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/testenv"
)

// TestOtherMaps has what another version pinned give way.
func TestOtherMaps(t *testing.T) {
	n := newNode(t, "a", fastpath.Options{})
	a, b := n.pod(t, 1, 2), n.pod(t, 1, 3)
	n.open(t)
	n.set(t)
	n.path.Close()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: pin.Pods, Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 7})
	testenv.Must(t, err)
	defer m.Close()
	old, err := ebpf.LoadPinnedMap(filepath.Join(n.opts.Dir, pin.Pods), nil)
	testenv.Must(t, err)
	testenv.Must(t, old.Unpin())
	old.Close()
	testenv.Must(t, m.Pin(filepath.Join(n.opts.Dir, pin.Pods)))
	n.open(t)
	n.set(t)
	serve(t, b)
	has(t, "another version", n.counted(t, func() { testenv.Must(t, echo(a.Namespace, "tcp", b.addrs[0], 8080, 1000)) }), "redirected to_pod")
}

// TestSupported keeps the line that says what is missing to one line, and empty where nothing is.
func TestSupported(t *testing.T) {
	for _, s := range []fastpath.Support{{TCX: true, Conntrack: true}, {TCX: true}, {Conntrack: true}, {Missing: []string{"x", "y"}}} {
		if got := s.String(); (got == "") != (s.TCX && s.Conntrack) {
			t.Errorf("%+v: %q", s, got)
		}
	}
}
