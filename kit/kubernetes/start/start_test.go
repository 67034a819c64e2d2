package start

import (
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

// The package's own init has run: its collection comes first.
func TestDeferCollection(t *testing.T) {
	for deadline := time.Now().Add(time.Minute); ; {
		runtime.GC()
		percent := debug.SetGCPercent(100)
		debug.SetGCPercent(percent)
		if percent > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("after a collection, collection is still off")
		}
		time.Sleep(time.Millisecond)
	}
	limit := debug.SetMemoryLimit(-1)
	deferCollection(limit) // the user's limit is lower: it stays as it is
	if got := debug.SetMemoryLimit(-1); got != limit {
		t.Errorf("the limit is %d, was %d", got, limit)
	}
}

func TestWantsTranslation(t *testing.T) {
	for _, tc := range []struct {
		args []string
		env  map[string]string
		want bool
	}{
		{[]string{"kubelet"}, map[string]string{"LANG": "fr_FR.UTF-8"}, false},
		{[]string{"kubectl"}, nil, false},
		{[]string{"/usr/local/bin/kubectl", "get"}, map[string]string{"LANG": "C.UTF-8"}, false},
		{[]string{"kubectl"}, map[string]string{"LANG": "en_GB.UTF-8"}, false},
		{[]string{"kubectl"}, map[string]string{"LANG": "fr_FR.UTF-8"}, true},
		{[]string{"kube", "kubectl"}, map[string]string{"LANG": "de_DE.UTF-8"}, true},
		{[]string{"kubectl"}, map[string]string{"LANG": "de_DE.UTF-8", "LC_ALL": "C"}, false},
		{nil, nil, false},
	} {
		if got := wantsTranslation(tc.args, func(name string) string { return tc.env[name] }); got != tc.want {
			t.Errorf("%v with %v: %v", tc.args, tc.env, got)
		}
	}
}
