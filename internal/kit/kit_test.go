package kit

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

func TestFind(t *testing.T) {
	const json = `{"kubernetes":"v1.2.3","somethingNew":"is ignored"}`
	for _, tt := range []struct {
		name string
		kit  string // where the kit is, under the root
		link bool   // the executable is run through a symlink elsewhere
		json string
		want string // part of the error
	}{
		{name: "beside", kit: "bin/kit", json: json},
		{name: "installed", kit: "lib/fathom/kit", json: json},
		{name: "through a symlink", kit: "bin/kit", link: true, json: json},
		{name: "none", want: "make kit"},
		{name: "broken", kit: "bin/kit", json: "{", want: "build the kit again"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			exe := filepath.Join(root, "bin", "fathom")
			write(t, exe, "")
			if tt.kit != "" {
				write(t, filepath.Join(root, tt.kit, "kit.json"), tt.json)
			}
			if tt.link {
				link := filepath.Join(t.TempDir(), "fathom")
				if err := os.Symlink(exe, link); err != nil {
					t.Fatal(err)
				}
				exe = link
			}
			k, err := find(exe)
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Fatalf("error %v, want one with %q", err, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if want := filepath.Join(root, tt.kit); k.Dir != want {
				t.Errorf("Dir %s, want %s", k.Dir, want)
			}
			if k.Kubernetes != "v1.2.3" {
				t.Errorf("Kubernetes %q", k.Kubernetes)
			}
			if got, want := k.Own("fathom-init"), filepath.Join(root, filepath.Dir(tt.kit), "fathom-init"); got != want {
				t.Errorf("fathom-init is looked for at %s, want %s", got, want)
			}
		})
	}
}

func TestFindByEnvironment(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(Env, dir)
	if _, err := Find(); err == nil || !strings.Contains(err.Error(), "$"+Env) {
		t.Errorf("error %v, want one that names $%s", err, Env)
	}
	write(t, filepath.Join(dir, "kit.json"), `{"etcd":"v3"}`)
	k, err := Find()
	if err != nil {
		t.Fatal(err)
	}
	if k.Dir != dir || k.Etcd != "v3" {
		t.Errorf("got %+v", k)
	}
}

// A kit that the environment names has nothing to do with where Fathom's own programs are.
func TestFindOwnByEnvironment(t *testing.T) {
	kit := t.TempDir()
	write(t, filepath.Join(kit, "kit.json"), `{}`)
	t.Setenv(Env, kit)
	for _, own := range []string{"bin", "lib/fathom"} {
		root := t.TempDir()
		write(t, filepath.Join(root, "bin/fathom"), "")
		write(t, filepath.Join(root, own, "fathom-init"), "")
		k, err := find(filepath.Join(root, "bin/fathom"))
		if err != nil {
			t.Fatal(err)
		}
		if got, want := k.Own("fathom-init"), filepath.Join(root, own, "fathom-init"); got != want {
			t.Errorf("fathom-init is looked for at %s, want %s", got, want)
		}
	}
}

func TestRequire(t *testing.T) {
	k := Kit{Dir: t.TempDir()}
	write(t, k.Bin("kube"), "")
	if err := k.Require(k.Bin("kube")); err != nil {
		t.Error(err)
	}
	err := k.Require(k.Bin("kube"), k.Program("pause"))
	if err == nil || !strings.Contains(err.Error(), "lacks programs/pause;") {
		t.Errorf("error %v, want one that names programs/pause", err)
	}
}
