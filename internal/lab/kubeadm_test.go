package lab

import (
	"net/netip"
	"os"
	"strings"
	"testing"
)

func TestAdaptCoreDNS(t *testing.T) {
	in, err := os.ReadFile("testdata/coredns.yaml") // what kubeadm 1.36.3 prints
	if err != nil {
		t.Fatal(err)
	}
	base, deployment, err := adaptCoreDNS(string(in))
	if err != nil {
		t.Fatal(err)
	}
	var kinds []string
	for line := range strings.Lines(string(base) + "\n" + string(deployment)) {
		if kind, found := strings.CutPrefix(line, "kind: "); found {
			kinds = append(kinds, strings.TrimSpace(kind))
		}
	}
	want := "ConfigMap Service ClusterRole ClusterRoleBinding ServiceAccount Deployment"
	if got := strings.Join(kinds, " "); got != want {
		t.Errorf("kinds are %s, want %s", got, want)
	}
	if !strings.Contains(string(deployment), "          periodSeconds: 1\n") {
		t.Errorf("readiness is not asked every second:\n%s", deployment)
	}
	for _, bad := range []string{"kind: [", "kind: Deployment\nspec: {template: {spec: {containers: []}}}", "kind: Service"} {
		if _, _, err := adaptCoreDNS(bad); err == nil {
			t.Errorf("%q gives no error", bad)
		}
	}
}

func TestUsableResolvConf(t *testing.T) {
	for _, tc := range []struct{ name, in, want string }{
		{"plain", "# made by hand\nsearch example.org\nnameserver 192.0.2.1\noptions ndots:2\n", "search example.org\nnameserver 192.0.2.1\noptions ndots:2\n"},
		{"a stub on loopback is of no use to a node", "nameserver 127.0.0.53\noptions edns0\n", ""},
		{"one of two", "nameserver ::1\nnameserver 2001:db8::1\n", "nameserver 2001:db8::1\n"},
		{"garbage", "nameserver\nnameserver x\n", ""},
		{"empty", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := usableResolvConf(tc.in); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

// What is kept of a resolv.conf has a name server that nodes reach, and is kept again as it is.
func FuzzUsableResolvConf(f *testing.F) {
	f.Add("# by hand\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nsearch example.com\noptions edns0\n")
	f.Add("nameserver fe80::1%eth0\nnameserver ::1\n")
	f.Add("nameserver\t192.0.2.1 trailing")
	f.Fuzz(func(t *testing.T, conf string) {
		kept := usableResolvConf(conf)
		if again := usableResolvConf(kept); again != kept {
			t.Errorf("%q keeps %q, of which is kept %q", conf, kept, again)
		}
		for line := range strings.Lines(kept) {
			if fields := strings.Fields(line); fields[0] == "nameserver" {
				if addr, err := netip.ParseAddr(fields[1]); err != nil || addr.IsLoopback() {
					t.Errorf("name server %q", line)
				}
			}
		}
	})
}
