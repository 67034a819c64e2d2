package cni_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/testenv"
)

// BenchmarkAdd measures ADD as a runtime sees it, from the start of the process to its end, with no pods and with
// 100 on the node. Each round has one of ours and one of the reference plugins bridge and host-local, which are
// configured as most clusters have them, so that both meet the same machine.
//
//	go test -run '^$' -bench Add -benchtime 200x ./internal/cni
func BenchmarkAdd(b *testing.B) {
	for _, families := range []int{1, 2} {
		for _, pods := range []int{0, 100} {
			b.Run(fmt.Sprintf("families=%d/pods=%d", families, pods), func(b *testing.B) { benchmarkAdd(b, families, pods) })
		}
	}
}

func benchmarkAdd(b *testing.B, families, pods int) {
	n := newNode(b)
	ranges := []string{"10.244.1.0/24", "fd00:10:244:1::/64"}[:families]
	n.conf["pools"] = []any{map[string]any{"name": "default", "ranges": ranges}}
	n.conf["nodeAddresses"] = nodeAddresses[:families]
	ours, err := program()
	testenv.Must(b, err)
	reference, err := filepath.Abs(kit + "/cni")
	testenv.Must(b, err)
	var subnets []any
	for _, r := range []string{"10.245.1.0/24", "fd00:10:245:1::/64"}[:families] {
		subnets = append(subnets, []any{map[string]any{"subnet": r}})
	}
	bridge := map[string]any{
		"cniVersion": "1.0.0", "name": "reference", "type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "mtu": 1450,
		"ipam": map[string]any{
			"type": "host-local", "ranges": subnets, "dataDir": filepath.Join(n.dir, "host-local"),
			"routes": []any{map[string]any{"dst": "0.0.0.0/0"}, map[string]any{"dst": "::/0"}}[:families],
		},
	}
	own := map[string]any{"cniVersion": "1.1.0", "name": "fathom"}
	for k, v := range n.conf {
		own[k] = v
	}
	var id int
	call := func(plugin, command, netns string, id int, conf map[string]any) (wall, cpu time.Duration) {
		data, err := json.Marshal(conf)
		testenv.Must(b, err)
		var out bytes.Buffer
		cmd := exec.Command(plugin)
		cmd.Env = []string{
			"CNI_COMMAND=" + command, fmt.Sprintf("CNI_CONTAINERID=c%d", id), "CNI_IFNAME=eth0", "CNI_NETNS=" + netns, "CNI_PATH=" + reference,
			fmt.Sprintf("CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-%d", id), "PATH=" + os.Getenv("PATH"),
		}
		cmd.Stdin, cmd.Stdout = bytes.NewReader(data), &out
		start := time.Now()
		testenv.Must(b, n.Start(cmd))
		if err := cmd.Wait(); err != nil {
			b.Fatalf("%s %s: %v: %s", plugin, command, err, &out)
		}
		return time.Since(start), cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	}
	dir := b.TempDir()
	attach := func(plugin string, conf map[string]any) (add, cpu time.Duration, detach func() time.Duration) {
		id++
		mine, path := id, filepath.Join(dir, fmt.Sprint(id))
		testenv.Must(b, link.Create(path))
		// Not before the end: the kernel takes namespaces apart behind our back, and holds the lock of all devices
		// meanwhile, which the next ADD would wait for.
		b.Cleanup(func() { testenv.Must(b, link.Delete(path)) })
		add, cpu = call(plugin, "ADD", path, mine, conf)
		return add, cpu, func() time.Duration {
			d, _ := call(plugin, "DEL", path, mine, conf)
			return d
		}
	}
	kinds := []struct {
		name, plugin  string
		conf          map[string]any
		add, cpu, del []time.Duration
	}{
		{name: "fathom", plugin: ours, conf: own},
		{name: "bridge", plugin: filepath.Join(reference, "bridge"), conf: bridge},
	}
	for range pods {
		for _, k := range kinds {
			_, _, detach := attach(k.plugin, k.conf)
			defer detach()
		}
	}
	b.ResetTimer()
	for i := range b.N {
		for j := range kinds {
			k := &kinds[(i+j)%len(kinds)] // who is first takes turns, too
			add, cpu, detach := attach(k.plugin, k.conf)
			k.add, k.cpu, k.del = append(k.add, add), append(k.cpu, cpu), append(k.del, detach())
		}
	}
	b.StopTimer()
	percentile := func(all []time.Duration, p int) float64 {
		all = slices.Sorted(slices.Values(all))
		return float64(all[(len(all)-1)*p/100].Microseconds()) / 1000
	}
	b.ReportMetric(0, "ns/op") // of a round with both, which says nothing
	for _, k := range kinds {
		b.ReportMetric(percentile(k.add, 50), k.name+"-p50-ms")
		b.ReportMetric(percentile(k.add, 99), k.name+"-p99-ms")
		b.ReportMetric(percentile(k.cpu, 50), k.name+"-cpu-ms")
		b.ReportMetric(percentile(k.del, 50), k.name+"-del-p50-ms")
	}
	b.ReportMetric(percentile(kinds[1].add, 50)/percentile(kinds[0].add, 50), "times-faster")
}
