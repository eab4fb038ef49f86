# One allocation per VM of the list: nomad job run nomad.hcl
job "hyper2kvm" {
  type = "batch"

  group "convert" {
    # Machines in the list. How many run at a time follows from `resources` and the clients.
    count = 3

    restart {
      attempts = 1
      mode     = "fail"
    }

    volume "exports" {
      type      = "host"
      source    = "exports"
      read_only = true
    }

    volume "converted" {
      type   = "host"
      source = "converted"
    }

    task "convert" {
      driver       = "podman"
      kill_timeout = "120s"

      config {
        image           = "registry.example/hyper2kvm:0.1.0"
        readonly_rootfs = true
        tmpfs           = ["/tmp"]
        cap_drop        = ["all"]
        args            = ["convert", "--batch", "/in/fleet.yaml", "--only", "${NOMAD_ALLOC_INDEX}", "--progress", "plain"]
      }

      volume_mount {
        volume      = "exports"
        destination = "/in"
        read_only   = true
      }

      volume_mount {
        volume      = "converted"
        destination = "/out"
      }

      resources {
        cores  = 2
        memory = 2048
      }
    }
  }
}
