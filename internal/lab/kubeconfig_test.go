package lab

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/lab/kubeconfig"
)

// testLab is a lab of two clusters whose admin.conf files are there, as kubeadm writes them.
func testLab(t *testing.T, name string) *Lab {
	t.Helper()
	def, err := topology.Default(topology.Overrides{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	l := &Lab{Lab: *def, Paths: Paths{State: t.TempDir(), Cache: t.TempDir(), Run: t.TempDir()}}
	for i := range l.Clusters {
		c := &l.Clusters[i]
		conf := clientcmdapi.Config{
			Clusters:       map[string]*clientcmdapi.Cluster{c.Name: {Server: "https://192.0.2.1:6443", CertificateAuthorityData: []byte("ca of " + name + c.Name)}},
			AuthInfos:      map[string]*clientcmdapi.AuthInfo{"kubernetes-admin": {ClientKeyData: []byte("key of " + name + c.Name)}},
			Contexts:       map[string]*clientcmdapi.Context{"kubernetes-admin@" + c.Name: {Cluster: c.Name, AuthInfo: "kubernetes-admin"}},
			CurrentContext: "kubernetes-admin@" + c.Name,
		}
		data, err := clientcmd.Write(conf)
		if err != nil {
			t.Fatal(err)
		}
		if err := writeFile(l.AdminKubeconfig(c), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

func contexts(t *testing.T, path string) ([]string, string) {
	t.Helper()
	conf, err := clientcmd.LoadFromFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for name := range conf.Contexts {
		names = append(names, name)
		if conf.Clusters[conf.Contexts[name].Cluster] == nil || conf.AuthInfos[conf.Contexts[name].AuthInfo] == nil {
			t.Errorf("context %s points nowhere", name)
		}
	}
	slices.Sort(names)
	return names, conf.CurrentContext
}

func TestKubeconfigOfSeveralLabs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dir", "config")
	t.Setenv("KUBECONFIG", path)
	a, b := testLab(t, "a"), testLab(t, "b")

	for range 2 { // merging again changes nothing
		for _, l := range []*Lab{a, b} {
			if err := l.mergeKubeconfig(); err != nil {
				t.Fatal(err)
			}
		}
	}
	names, current := contexts(t, path)
	if want := []string{"a-east", "a-west", "b-east", "b-west"}; !slices.Equal(names, want) || current != "b-east" {
		t.Errorf("contexts are %v with %s current, want %v and b-east", names, current, want)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode is %v (%v), want 0600: it holds keys", st.Mode(), err)
	}

	gone := &Lab{Lab: topology.Lab{Name: "b"}, Paths: b.Paths} // `down` may know no more than the name
	if err := gone.cleanKubeconfig(nil); err != nil {
		t.Fatal(err)
	}
	names, current = contexts(t, path)
	if want := []string{"a-east", "a-west"}; !slices.Equal(names, want) || current != "a-east" {
		t.Errorf("contexts are %v with %q current, want %v and a-east", names, current, want)
	}
}

// TestKubeconfigOfAnotherEnvironment takes a lab out of the file that up wrote to, wherever $KUBECONFIG points since.
func TestKubeconfigOfAnotherEnvironment(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	path := filepath.Join(home, "mine")
	const text = "# mine\nclusters: []\ncurrent-context: prod\n"
	if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBECONFIG", path)
	l := testLab(t, "a")
	if err := l.checkKubeconfig(); err != nil {
		t.Fatal(err)
	}
	if err := l.mergeKubeconfig(); err != nil {
		t.Fatal(err)
	}
	names, current := contexts(t, path)
	if want := []string{"a-east", "a-west"}; !slices.Equal(names, want) || current != "a-east" {
		t.Errorf("contexts are %v with %q current, want %v and a-east", names, current, want)
	}
	t.Setenv("KUBECONFIG", "")
	if err := l.cleanKubeconfig(l.notedKubeconfigs()); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != text {
		t.Errorf("it is %q (%v), want %q", data, err, text)
	}
}

func TestKubeconfigWithAContextOfThatName(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config")
	const text = "contexts:\n- {name: a-west, context: {cluster: mine, user: me}}\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBECONFIG", path)
	l := testLab(t, "a")
	for _, err := range []error{l.checkKubeconfig(), l.mergeKubeconfig(), l.cleanKubeconfig(l.notedKubeconfigs())}[:2] {
		if !kubeconfig.IsTaken(err) {
			t.Errorf("got %v, want a TakenError", err)
		}
	}
	if data, _ := os.ReadFile(path); string(data) != text {
		t.Errorf("it became %q", data)
	}
}

func TestDamagedKubeconfigIsNotTouched(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config")
	const damaged = "clusters: [}\n"
	if err := os.WriteFile(path, []byte(damaged), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBECONFIG", path)
	if err := testLab(t, "a").mergeKubeconfig(); err == nil {
		t.Error("a damaged kubeconfig gives no error")
	}
	if data, _ := os.ReadFile(path); string(data) != damaged {
		t.Errorf("it was overwritten with %q", data)
	}
}

func TestLockTellsWhoHoldsIt(t *testing.T) {
	paths := Paths{State: filepath.Join(t.TempDir(), "state")}
	unlock, err := lock(paths, "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock(paths, "a"); err == nil {
		t.Fatal("it can be locked twice")
	} else if _, busy := err.(*BusyError); !busy {
		t.Errorf("got %v, want a BusyError", err)
	}
	if other, err := lock(paths, "b"); err != nil {
		t.Errorf("another lab is locked too: %v", err)
	} else {
		other()
	}
	unlock()
	unlock, err = lock(paths, "a")
	if err != nil {
		t.Fatalf("it stays locked: %v", err)
	}
	unlock()
	if _, err := os.Stat(paths.State); !os.IsNotExist(err) {
		t.Errorf("a command that did nothing leaves %s: %v", paths.State, err)
	}
}

func TestUplinkNamesFitAndDiffer(t *testing.T) {
	seen := map[string]string{}
	for _, name := range []string{"a", "fathom", "a-name-of-20-letters", "a-name-of-20-letterz", "twelve-chars"} {
		l := &Lab{Lab: topology.Lab{Name: name}}
		device := l.uplinkName()
		if len(device) > 15 || seen[device] != "" {
			t.Errorf("lab %s has uplink %s, as long as %d and the same as that of %q", name, device, len(device), seen[device])
		}
		seen[device] = name
	}
}

func TestNotFoundSaysWhatThereIs(t *testing.T) {
	l := testLab(t, "a")
	_, _, err := l.Node("east-worker9")
	if !IsNotFound(err) {
		t.Fatalf("got %v, want a NotFoundError", err)
	}
	want := `there is no node "east-worker9": there is east-control-plane, east-worker1, east-worker2, west-control-plane, west-worker1, west-worker2`
	if err.Error() != want {
		t.Errorf("got  %s\nwant %s", err, want)
	}
	if _, err := Open(l.Paths, "b"); !IsNotFound(err) {
		t.Errorf("got %v, want a NotFoundError", err)
	}
}

// Cluster c of lab a-b and cluster b-c of lab a have one name for a context: the second lab does not begin, whichever
// kubeconfig the first one's is in.
func TestContextsOfTwoLabs(t *testing.T) {
	paths := Paths{State: t.TempDir(), Cache: t.TempDir(), Run: t.TempDir()}
	of := func(name string, clusters ...string) *Lab {
		t.Helper()
		facts, err := topology.Default(topology.Overrides{Name: name, Clusters: clusters})
		if err != nil {
			t.Fatal(err)
		}
		facts.Underlay4, facts.Underlay6 = netip.MustParsePrefix("10.231.0.0/16"), netip.MustParsePrefix("fd00:fa:231::/48")
		return &Lab{Lab: *facts, Paths: paths}
	}
	first := of("a", "b-c", "d")
	if err := first.save(); err != nil {
		t.Fatal(err)
	}
	if err := first.checkContexts(); err != nil {
		t.Errorf("a lab beside none but itself: %v", err)
	}
	if err := of("a-b", "d", "b-c").checkContexts(); err != nil {
		t.Errorf("other names: %v", err)
	}
	err := of("a-b", "x", "c").checkContexts()
	if !errors.Is(err, ErrContextTaken) || !strings.Contains(err.Error(), "cluster c of lab a-b and cluster b-c of lab a would both have the context a-b-c") {
		t.Errorf("the same name: %v", err)
	}
}

// A path of the host that has gone since the lab file was read stops a node before anything of it starts.
func TestHostPathIsGone(t *testing.T) {
	l := testLab(t, "gone")
	c, path := &l.Clusters[0], filepath.Join(t.TempDir(), "data")
	c.Nodes[1].Mounts = []topology.Mount{{HostPath: path, NodePath: "/srv/data"}}
	if err := l.checkBinds(c, &c.Nodes[0]); err != nil {
		t.Errorf("a node without mounts: %v", err)
	}
	if err := l.checkBinds(c, &c.Nodes[1]); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), path) {
		t.Errorf("the path is gone: %v", err)
	}
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := l.checkBinds(c, &c.Nodes[1]); err != nil {
		t.Errorf("the path is there: %v", err)
	}
}
