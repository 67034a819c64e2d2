package corefile

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/coredns/caddy/caddyfile"
)

// kubeadm is the Corefile of kubeadm's clusters.
const kubeadm = `.:53 {
    errors
    health {
       lameduck 5s
    }
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {
       pods insecure
       fallthrough in-addr.arpa ip6.arpa
       ttl 30
    }
    prometheus :9153
    forward . /etc/resolv.conf {
       max_concurrent 1000
    }
    cache 30 {
       disable success cluster.local
       disable denial cluster.local
    }
    loop
    reload
    loadbalance
}
`

// k3s is the one of k3s, whose users add to it by ConfigMap coredns-custom.
const k3s = `.:53 {
    errors
    health
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {
      pods insecure
      fallthrough in-addr.arpa ip6.arpa
    }
    hosts /etc/coredns/NodeHosts {
      ttl 60
      reload 15s
      fallthrough
    }
    prometheus :9153
    cache 30
    loop
    reload
    loadbalance
    import custom/*.override
    forward . /etc/resolv.conf
}
import custom/*.server
`

// write puts files into a directory.
func write(t testing.TB, files map[string]string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if strings.HasSuffix(name, "/") {
			path += "/"
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, "/") {
			continue
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestFind(t *testing.T) {
	with := func(line string) map[string]string {
		return map[string]string{"Corefile": strings.Replace(kubeadm, "    ready\n", "    ready\n    "+line+"\n", 1)}
	}
	for _, test := range []struct {
		what  string
		files map[string]string
		want  string // "plugin@line", and "error: part" of an error
	}{
		{"kubeadm's", map[string]string{"Corefile": kubeadm}, ""},
		{"k3s's, with nothing of the user's", map[string]string{"Corefile": k3s, "custom/": ""}, ""},

		// Plugins that look at who asks
		{"acl", with("acl {\n block net 10.244.0.0/16\n}"), "acl@7"},
		{"acl of a zone", with("acl secret.example { block }"), "acl@7"},
		{"view", map[string]string{"Corefile": ".:53 {\n view inside {\n expr incidr(client_ip(), '10.0.0.0/8')\n }\n hosts {\n 10.0.0.1 a.example\n }\n}\n" + kubeadm}, "view@2"},
		{"autopath of pods", with("autopath @kubernetes"), "autopath@7"},
		{"autopath of pods, in a zone", with("autopath cluster.local @kubernetes"), "autopath@7"},
		{"autopath of a file", with("autopath /etc/resolv.conf"), ""},
		{"dns64", with("dns64"), "dns64@7"},
		{"dns64 for all", with("dns64 {\n allow_ipv4\n }"), ""},
		{"rewrite that tells of the client", with("rewrite edns0 local set 0xffee {client_ip}"), "rewrite@7"},
		{"rewrite by metadata", with("rewrite continue edns0 local set 0xffee {kubernetes/client-namespace}"), "rewrite@7"},
		{"rewrite that passes on the client's subnet", with("rewrite stop edns0 subnet set 24 56"), "rewrite@7"},
		{"rewrite that tells of the name", with("rewrite edns0 local set 0xffee {qname}"), ""},
		{"rewrite of names", with(`rewrite name regex (.*)\.old\.example {1}.new.example`), ""},
		{"template", with(`template IN A example { answer "{{ .Name }} 60 IN A 192.0.2.1" }`), ""},
		{"template of the client's address", with("template IN A me.example {\n answer \"{{ .Name }} 60 IN A {{ .Remote }}\"\n }"), "template@7"},
		{"template of metadata", with("template IN TXT me.example {\n answer `{{ .Name }} 60 IN TXT {{ .Meta \"kubernetes/client-namespace\" }}`\n }"), "template@7"},
		{"whoami", with("whoami"), "whoami@7"},
		{"geoip", with("geoip /db.mmdb"), "geoip@7"},
		{"tsig", with("tsig {\n require all\n}"), "tsig@7"},
		{"a policy that does not come with CoreDNS", with("firewall query {\n opa myengine\n }"), "firewall@7"},
		{"two", with("acl { block }\nwhoami"), "acl@7 whoami@8"},

		// Which servers count
		{"a stub domain's", map[string]string{"Corefile": kubeadm + "corp.example {\n acl { block }\n forward . 192.0.2.53\n}"}, "acl@25"},
		{"one by its transport", map[string]string{"Corefile": kubeadm + "dns://corp.example:53 {\n acl { block }\n}"}, "acl@25"},
		{"another port's", map[string]string{"Corefile": kubeadm + "corp.example:1053 {\n acl { block }\n}"}, ""},
		{"one by TLS", map[string]string{"Corefile": kubeadm + "tls://corp.example {\n acl { block }\n}"}, ""},
		{"two names, one at port 53", map[string]string{"Corefile": kubeadm + "a.example:1053, \n b.example {\n acl { block }\n}"}, "acl@26"},
		{"a port of a variable", map[string]string{"Corefile": kubeadm + "corp.example:{$PORT} {\n acl { block }\n}"}, "acl@25"},
		{"a range of IPv6 addresses", map[string]string{"Corefile": kubeadm + "fd00::/8 {\n acl { block }\n}"}, "acl@25"},
		{"one server needs no braces", map[string]string{"Corefile": ".:53\nerrors\nacl { block }\n"}, "acl@3"},
		{"the brace on its own line", map[string]string{"Corefile": ".:53\n{\nacl { block }\n}\n"}, "acl@3"},
		{"no acl but words", map[string]string{"Corefile": ".:53 {\n # acl\n hosts acl {\n  10.0.0.1 acl\n }\n log \"acl\n acl\"\n}\n"}, ""},

		// What is imported
		{"an override", map[string]string{"Corefile": k3s, "custom/a.override": "log\nacl {\n block\n}\n"}, "acl@2"},
		{"a server", map[string]string{"Corefile": k3s, "custom/a.server": "corp.example {\n acl { block }\n}"}, "acl@2"},
		{"what is not imported", map[string]string{"Corefile": k3s, "custom/a.txt": "acl { block }"}, ""},
		{"a snippet", map[string]string{"Corefile": "(policy) {\n acl { block }\n}\n.:53 {\n errors\n import policy\n}"}, "acl@2"},
		{"a snippet on one line", map[string]string{"Corefile": "(policy) { acl }\n.:53 {\n errors\n import policy\n}"}, "acl@1"},
		{"a snippet of a snippet", map[string]string{"Corefile": "(a) {\n acl\n}\n(b) {\n import a\n}\n.:53 {\n import b\n}"}, "acl@2"},
		{"a snippet that nobody uses", map[string]string{"Corefile": "(policy) {\n acl { block }\n}\n" + kubeadm}, ""},
		{"inside a plugin's block", map[string]string{"Corefile": "(answer) {\n answer \"{{ .Remote }}\"\n}\n.:53 {\n template IN A a.example {\n  import answer\n }\n}"}, "template@5"},
		{"a directory that is not here", map[string]string{"Corefile": k3s}, "error: custom/*.server is not known here"},
		{"another directory", with("import /etc/*.conf"), "error: another directory"},
		{"a file that is not here", with("import more"), "error: more is not known here"},
		{"itself", with("import Corefile"), "error: more than 10 imports"},
		{"a snippet of itself", map[string]string{"Corefile": "(a) {\n import a\n import a\n}\n.:53 {\n import a\n}"}, "error: more than 10 imports"},

		// What is no configuration
		{"none", map[string]string{"custom/": ""}, "error: no such file"},
		{"an empty one, by which CoreDNS answers with clients' addresses", map[string]string{"Corefile": "# nothing\n"}, "error: no server for port 53"},
		{"no end", map[string]string{"Corefile": ".:53 {\n errors\n"}, "error: has no end"},
		{"no name", map[string]string{"Corefile": "{\n errors\n}\n"}, "error: without a name"},
		{"too large", map[string]string{"Corefile": strings.Repeat("#", maxFile+1)}, "error: more than 1048576 bytes"},
		{"too many words", map[string]string{"Corefile": strings.Repeat("a ", maxFile/2)}, "error: more than 200000 words"},
	} {
		found, err := Find(filepath.Join(write(t, test.files), "Corefile"))
		if part, isError := strings.CutPrefix(test.want, "error: "); isError {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("%s: got %v and error %v, want one with %q", test.what, found, err, part)
			}
			continue
		}
		var got []string
		for _, d := range found {
			got = append(got, d.Plugin+"@"+strconv.Itoa(d.Line))
			if d.Why == "" || d.Server == "" || !strings.Contains(d.String(), d.Plugin+", which "+d.Why) {
				t.Errorf("%s: says %q", test.what, d)
			}
		}
		if err != nil || strings.Join(got, " ") != test.want {
			t.Errorf("%s: got %q, error %v, want %q", test.what, got, err, test.want)
		}
	}
}

// FuzzFind reads anything. What CoreDNS's own reader takes for a server at port 53 with a plugin that looks at who asks is
// found, or cannot be known.
func FuzzFind(f *testing.F) {
	for _, seed := range []string{kubeadm, k3s, ".:53 {\n acl {\n block\n }\n}", "a, b:53\n{\nview x {\n}\n}", ".:53\nwhoami", "(a) { acl }\n. {\n import a\n}", ". {\n log \"\n\" acl\n}", "import a\n. { b { c } acl\n}"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		path := filepath.Join(write(t, map[string]string{"Corefile": text, "custom/a.server": "x.example {\n}"}), "Corefile")
		found, err := Find(path)
		if err != nil && found != nil {
			t.Errorf("%v and %v", found, err)
		}
		if strings.Contains(text, "import") || strings.ContainsAny(text, "%$") {
			return // may have no end, and depends on the environment
		}
		blocks, invalid := caddyfile.Parse(path, strings.NewReader(text), nil)
		if invalid != nil || err != nil {
			return
		}
		for _, b := range blocks {
			for _, plugin := range []string{"acl", "view", "whoami"} {
				if b.Tokens[plugin] != nil && slices.Contains(b.Keys, ".:53") && !slices.ContainsFunc(found, func(d Dependence) bool { return d.Plugin == plugin }) {
					t.Errorf("%s is not found in\n%s", plugin, text)
				}
			}
		}
	})
}
