package kubeconfig

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"k8s.io/client-go/tools/clientcmd"
)

func entries(lab string, clusters ...string) []Entry {
	if len(clusters) == 0 {
		clusters = []string{"east", "west"}
	}
	var all []Entry
	for _, c := range clusters {
		all = append(all, Entry{
			Name:    lab + "-" + c,
			Cluster: json.RawMessage(`{"server":"https://192.0.2.1:6443","certificate-authority-data":"Y2E="}`),
			User:    json.RawMessage(fmt.Sprintf(`{"client-certificate-data":"Y2VydA==","client-key-data":"a2V5%s"}`, "IG9m")),
		})
	}
	return all
}

func add(t *testing.T, text, lab string) string {
	t.Helper()
	out, err := Add([]byte(text), lab, entries(lab), Made{})
	if err != nil {
		t.Fatalf("Add %s: %v\n%s", lab, err, text)
	}
	check(t, string(out), lab, true)
	return string(out)
}

func remove(t *testing.T, text, lab string) string {
	t.Helper()
	out, _, err := Remove([]byte(text), lab)
	if err != nil {
		t.Fatalf("Remove %s: %v\n%s", lab, err, text)
	}
	check(t, string(out), lab, false)
	return string(out)
}

// check reads a kubeconfig as kubectl does and looks for a lab's entries.
func check(t *testing.T, text, lab string, want bool) {
	t.Helper()
	conf, err := clientcmd.Load([]byte(text))
	if err != nil {
		t.Fatalf("kubectl does not read it: %v\n%s", err, text)
	}
	for _, name := range []string{lab + "-east", lab + "-west"} {
		if got := conf.Contexts[name] != nil && conf.Clusters[name] != nil && conf.AuthInfos[name] != nil; got != want {
			t.Fatalf("context %s is there: %v, want %v\n%s", name, got, want, text)
		}
		if want && (conf.Clusters[name].Server != "https://192.0.2.1:6443" || string(conf.AuthInfos[name].ClientKeyData) != "key of") {
			t.Fatalf("context %s is not what was given\n%s", name, text)
		}
	}
	if current := conf.CurrentContext == lab+"-east"; current != want {
		t.Fatalf("the current context is %q\n%s", conf.CurrentContext, text)
	}
}

// samples are the kubeconfigs of testdata, as people and programs write them.
func samples(t testing.TB) map[string]string {
	t.Helper()
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(files) < 20 {
		t.Fatalf("testdata has %d files, %v", len(files), err)
	}
	all := map[string]string{
		"empty":                "",
		"blank":                "\n\n",
		"space without end":    "  ",
		"null":                 "---\n",
		"comment":              "# clusters come here one day\n",
		"comment without end":  "# clusters come here one day",
		"byte order mark":      "\ufeffapiVersion: v1\nkind: Config\ncurrent-context: prod\n",
		"mark of a blank file": "\ufeff",
		"braces":               "{}",
		"braces and line":      "{ }\n",
		"one line of JSON":     `{"kind":"Config","apiVersion":"v1","preferences":{},"clusters":[{"name":"a","cluster":{"server":"https://a"}}],"users":[],"contexts":null,"current-context":"a"}`,
		"current nothing":      "current-context:\nclusters:",
		"no line end":          "apiVersion: v1\nclusters:",
		"block at the end":     "kind: Config\nx-note: |\n  text",
		"old Mac":              "apiVersion: v1\rkind: Config\rclusters: []\r",
		"separator in comment": "apiVersion: v1 # a\u2028kind: Config\nclusters: ~\n",
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimSuffix(filepath.Base(file), ".yaml")
		all[name] = string(data)
		all[name+", CRLF"] = strings.ReplaceAll(string(data), "\n", "\r\n")
		all[name+", no line end"] = strings.TrimRight(string(data), "\n")
	}
	return all
}

func TestFilesComeOutAsTheyWere(t *testing.T) {
	for name, text := range samples(t) {
		t.Run(name, func(t *testing.T) {
			one := add(t, text, "a")
			if again := add(t, one, "a"); again != one {
				t.Errorf("adding again changes it:\n%s\n-- to --\n%s", one, again)
			}
			if got := remove(t, one, "a"); got != text {
				t.Errorf("after one lab:\n%q\nwant\n%q\nit was\n%s", got, text, one)
			}
			two := add(t, one, "b")
			if got := remove(t, two, "b"); got != one {
				t.Errorf("after the second of two labs:\n%q\nwant\n%q", got, one)
			}
			if got := remove(t, remove(t, two, "a"), "b"); got != text {
				t.Errorf("after two labs, the first first:\n%q\nwant\n%q", got, text)
			}
		})
	}
}

// TestAnyOrder has labs come and go in random order, and the text is the same in the end.
func TestAnyOrder(t *testing.T) {
	all := samples(t)
	names := slices.Sorted(func(yield func(string) bool) {
		for name := range all {
			if !yield(name) {
				return
			}
		}
	})
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	for range 30 {
		name := names[r.IntN(len(names))]
		text, up := all[name], map[string]bool{}
		for range 8 {
			lab := string(rune('a' + r.IntN(3)))
			if up[lab] && r.IntN(3) > 0 {
				text = remove(t, text, lab)
				delete(up, lab)
			} else {
				text = add(t, text, lab)
				up[lab] = true
			}
		}
		for lab := range up {
			text = remove(t, text, lab)
		}
		if text != all[name] {
			t.Fatalf("seed %d, %s:\n%q\nwant\n%q", seed, name, text, all[name])
		}
	}
}

// FuzzAdd holds that text either is refused or comes out as it was, and that nothing in it makes an edit panic.
func FuzzAdd(f *testing.F) {
	for _, text := range samples(f) {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		out, err := Add(text, "a", entries("a"), Made{})
		if (out == nil) == (err == nil) {
			t.Fatalf("Add returns %q and %v", out, err)
		}
		back, _, errBack := Remove(out, "a")
		if err == nil && (errBack != nil || !strings.Contains(string(text), Mark) && !strings.Contains(string(text), recordName) && string(back) != string(text)) {
			t.Fatalf("%q became %q, and then %q: %v", text, out, back, errBack)
		}
		if _, _, err := Remove(text, "a"); err != nil && !IsUneditable(err) {
			t.Fatalf("Remove: %v", err)
		}
	})
}
